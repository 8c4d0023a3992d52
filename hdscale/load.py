"""A model to decode with: a run, an export, any seq2seq checkpoint, or an extractive-QA one."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM

from hdscale.bases.gpu import prepare_cuda
from hdscale.bases.loading import quiet_loading
from hdscale.bases.sizes import tokenizer_name
from hdscale.config import Config, load_config
from hdscale.data.batches import IGNORED
from hdscale.data.tasks.aliases import canonical
from hdscale.data.tokenize import load_tokenizer
from hdscale.engine.devices import bf16_warning
from hdscale.errors import UserError
from hdscale.evaluation.generation import UNKNOWN_TASK, task_id_of
from hdscale.modeling.config import CONFIG_FILE
from hdscale.modeling.model import build_model, from_pretrained
from hdscale.ops.precision import DTYPES
from hdscale.resolve import resolve_model
from hdscale.runs.folder import ADAPTER, CONFIG

logger = logging.getLogger("hdscale.load")


@dataclasses.dataclass
class Loaded:
    """A model, its tokenizer, and what decoding needs to know of both."""

    model: Any
    tokenizer: Any
    task_ids: dict[str, int]
    """{task: its id in a task-conditioned model}."""
    version: str
    """Names the weights: predictions of another version are not used again."""
    extractive: bool = False
    """It marks spans of a context instead of generating."""

    @property
    def conditioned_on_tasks(self) -> bool:
        """Whether what it computes depends on a row's task."""
        return bool(getattr(getattr(self.model, "method", None), "needs_tasks", False))

    def task_id(self, name: str | None, unseen: str | None = None) -> int | None:
        """The id by which the model knows a task; None for a model that knows of no tasks.

        Args:
            name: of the task; None for free text.
            unseen: "mean" gives an unknown task the mean of all task embeddings.

        Raises:
            UserError: if the model is conditioned on tasks and does not know this one.
        """
        found = task_id_of(name, self.task_ids)
        if found == UNKNOWN_TASK and self.conditioned_on_tasks and unseen != "mean":
            raise UserError(
                f"the model does not know {f'task {name}' if name else 'free text'}; it knows "
                f"{', '.join(self.task_ids)}. --unseen-task mean gives such rows the mean of the task embeddings"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the user asked to load: `run` (a run's folder) or `model` (an export, a checkpoint folder or a hub id)."""

    run: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Raise UserError where nothing can be loaded; reads no weights."""
        if (self.run is None) == (self.model is None):
            raise UserError("give either --run DIR (a run's folder) or --model DIR_OR_HUB_ID")
        if self.run is not None:
            for name in (CONFIG, ADAPTER):
                if not (Path(self.run) / name).exists():
                    raise UserError(
                        f"{self.run}: no {name}; --run takes the folder of a finished run (runs/NAME), "
                        "--model an export or checkpoint"
                    )
        elif "/" not in str(self.model) and not Path(str(self.model)).exists():
            raise UserError(f"--model {self.model}: no such folder, and no hub id (OWNER/NAME)")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible here")

    def config(self, overrides: list[str] | None = None) -> Config:
        """The run's configuration, or the default one, with `key=value` over it."""
        return load_config(Path(self.run) / CONFIG if self.run is not None else None, overrides)

    def kind(self) -> str:
        """`run`, `export`, `seq2seq` or `extractive`, from configuration files alone.

        Raises:
            UserError: the checkpoint cannot be read, or is none of these.
        """
        if self.run is not None:
            return "run"
        name = str(self.model)
        if (Path(name) / CONFIG_FILE).is_file():
            return "export"
        try:
            described = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        if any(one.endswith("ForQuestionAnswering") for one in described.architectures or []):
            return "extractive"
        if not described.is_encoder_decoder:
            raise UserError(
                f"--model {name}: a {described.model_type} model is neither sequence-to-sequence nor extractive QA"
            )
        return "seq2seq"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def load(self, config: Config) -> Loaded:
        """Load weights and tokenizer.

        Raises:
            UserError: if there is no model that can be used.
        """
        self.check()
        device = self.torch_device
        if device.type == "cuda":
            prepare_cuda()
        dtype = DTYPES[self.dtype or (config.train.dtype if self.run else "bf16" if device.type == "cuda" else "fp32")]
        if slow := bf16_warning(device, dtype):
            logger.warning(slow)
        kind = self.kind()
        if kind == "run":
            return self._load_run(config, dtype, device)
        if kind == "export":
            return self._load_export(dtype, device)
        return self._load_checkpoint(kind == "extractive", dtype, device)

    def _load_run(self, config: Config, dtype: torch.dtype, device: torch.device) -> Loaded:
        """A run's exported trainables on the base that it was trained on (a random base comes from the run's seed)."""
        tokenizer = load_tokenizer(self.tokenizer or tokenizer_name(config.model), config.model.revision)
        described = resolve_model(config)
        described.model.init_adapter = None
        model = build_model(described, dtype, device, seed=config.run.seed)
        folder = Path(str(self.run)) / ADAPTER
        model.load_trainables(folder)
        return Loaded(model.eval(), tokenizer, ids_of(described.tasks), version_of(folder))

    def _load_export(self, dtype: torch.dtype, device: torch.device) -> Loaded:
        """Exported trainables on the base that they name."""
        folder = Path(str(self.model))
        model = from_pretrained(folder, dtype, device).eval()
        name = self.tokenizer or tokenizer_name(model.config.model)
        tokenizer = load_tokenizer(name, None if self.tokenizer else model.config.model.revision)
        return Loaded(model, tokenizer, ids_of(model.config.tasks), version_of(folder))

    def _load_checkpoint(self, extractive: bool, dtype: torch.dtype, device: torch.device) -> Loaded:
        """A checkpoint of transformers: sequence to sequence, or one that marks answers in a context."""
        name = str(self.model)
        tokenizer = load_tokenizer(self.tokenizer or name)
        kind = AutoModelForQuestionAnswering if extractive else AutoModelForSeq2SeqLM
        try:
            with quiet_loading():
                model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        return Loaded(model if extractive else Seq2Seq(model), tokenizer, {}, version_of(Path(name)), extractive)


def unreadable(name: str, error: Exception) -> UserError:
    """What is said of a checkpoint that transformers cannot read."""
    return UserError(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:200]})")


class Seq2Seq(nn.Module):
    """Any encoder-decoder of transformers behind the two methods that evaluation calls."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Token ids [B, T'], the decoder's start token first."""
        base: Any = self.base
        return base.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)

    def log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, task_ids: Tensor | None = None
    ) -> Tensor:
        """Summed token log-likelihood of the labels (-100 ignored), float32 [B]."""
        logits = self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).logits
        token = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return -token.sum(dim=1)


def ids_of(tasks: list[str]) -> dict[str, int]:
    """{task: its id}, under the package's names of the tasks."""
    return {canonical(name): number for number, name in enumerate(tasks)}


def version_of(place: Path) -> str:
    """A short name of a model's weights: its place, and sizes and times of a folder's files."""
    described = [str(place)]
    if place.is_dir():
        for path in sorted(place.iterdir()):
            if path.is_file():
                described.append(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
