"""What the analyses take from the command line: no torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal, Optional

from hdscale.settings import Settings, setting

LEARNING_RATE, EPOCHS, WARMUP_STEPS, BATCH_SIZE = 2e-5, 3, 500, 128
"""Appendix C; the batch size is that of GLUE training (3.2), because C states none."""


@dataclass
class EmbeddingOptions(Settings):
    """`hdscale analyze embeddings`."""

    tasks: list[str] = setting([], "tasks or mixtures; default: the run's", metavar="TASK")
    split: Literal["train", "validation", "test"] = setting("validation", "split whose rows are embedded")
    limit: int = setting(500, "rows of each task, a seeded sample", at_least=1)
    batch_size: int = setting(32, "rows per batch", at_least=1)
    seed: int = setting(0, "of t-SNE")
    output: Optional[str] = setting(None, "default: analysis/embeddings in the run's folder", metavar="DIR")
    device: Optional[Literal["cpu", "cuda"]] = setting(None, "default: a GPU where there is one")
    overrides: list[str] = setting([], "settings over the run's (data.root=...)", metavar="key=value")


@dataclass
class ClassifierOptions(Settings):
    """`hdscale classify`."""

    epochs: int = setting(EPOCHS, "epochs over the training rows", at_least=1)
    learning_rate: float = setting(LEARNING_RATE, "peak learning rate", above=0)
    warmup_steps: int = setting(WARMUP_STEPS, "steps of linear warm-up", at_least=0)
    batch_size: int = setting(BATCH_SIZE, "rows per step, and per pass of the encoder", at_least=1)
    limit: Optional[int] = setting(None, "a seeded sample of this many rows of each split (for trial runs)", at_least=1)
    seed: int = setting(0, "of the classifiers' weights and of the order of rows")
    device: Optional[Literal["cpu", "cuda"]] = setting(None, "of the encoder; default: a GPU where there is one")
    overrides: list[str] = setting([], "settings over the run's (data.root=...)", metavar="key=value")
