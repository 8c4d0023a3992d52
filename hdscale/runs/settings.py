"""Settings of the run (`run.*`)."""

from dataclasses import dataclass
from typing import Optional

from hdscale.settings import Settings, setting


@dataclass
class RunSettings(Settings):
    """Name and place of the run."""

    name: str = setting("run", "name of the run: its folder in run.dir")
    dir: str = setting("runs", "folder of all runs")
    seed: int = setting(42, "seed of initialisation, data order and dropout", at_least=0, below=2**63)
    threads: Optional[int] = setting(
        None, "CPU threads per rank; default: OMP_NUM_THREADS, or what torch chooses", at_least=1
    )
    tensorboard: bool = setting(False, "write TensorBoard events beside metrics.jsonl")
    wandb: Optional[str] = setting(None, "Weights & Biases project to log to")
