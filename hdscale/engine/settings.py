"""Settings of training and of the run (`train.*`, `run.*`)."""

from dataclasses import dataclass
from typing import Optional

from hdscale.settings import setting


@dataclass
class TrainSettings:
    """Optimisation (Section 3.2) and how a global batch is computed."""

    max_steps: int = setting(65536, "optimizer steps")
    epochs: Optional[float] = setting(None, "epochs over the mixture, in place of max_steps")
    global_batch_size: int = setting(128, "instances of one step, whatever the number of ranks")
    micro_batch_size: Optional[int] = setting(
        None, "instances of one forward pass of a rank; default: all of the rank's"
    )
    tokens_per_micro_batch: Optional[str] = setting(
        None,
        "most source and target tokens of one forward pass, padding included: a number, or auto (tried once, then kept "
        "with the run); null: as many rows in each",
    )
    sort_by_length: bool = setting(True, "micro-batches of rows of like length: the same gradient, less padding")
    learning_rate: float = setting(3e-4, "peak learning rate of AdamW")
    warmup_steps: int = setting(500, "linear warm-up; then linear decay to 0 at max_steps")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    gradient_clipping: float = setting(1.0, "clip the global gradient norm (0: off)")
    label_smoothing: float = setting(0.0, "label smoothing (the release used 0.1 with a summed loss)")
    loss_reduction: str = setting("mean", "loss over the global batch's target tokens: mean or sum")
    dtype: str = setting("bf16", "numbers of the frozen base and of the computation: bf16 or fp32; masters are fp32")
    compile: str = setting("auto", "torch.compile of the stacks: off, on or auto (off on CPU)")
    checkpoint_every: int = setting(1000, "save a checkpoint every so many steps")
    keep_checkpoints: int = setting(2, "checkpoints kept (the newest ones)")
    log_every: int = setting(10, "write metrics every so many steps")


@dataclass
class RunSettings:
    """Name and place of the run."""

    name: str = setting("run", "name of the run: its folder in run.dir")
    dir: str = setting("runs", "folder of all runs")
    seed: int = setting(42, "seed of initialisation, data order and dropout")
    threads: Optional[int] = setting(None, "CPU threads of a rank; default: what torch finds or OMP_NUM_THREADS")
    tensorboard: bool = setting(False, "write TensorBoard events beside metrics.jsonl")
    wandb: Optional[str] = setting(None, "Weights & Biases project to log to")
