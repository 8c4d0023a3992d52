"""Settings of training (`train.*`)."""

from dataclasses import dataclass
from typing import Literal, Optional

from hdscale.errors import UserError
from hdscale.settings import Settings, setting

AUTO = "auto"
CPU_TOKENS = 1024
"""Most tokens per pass on a CPU, where neither rows nor tokens are given: passes of similar rows, with little padding.
Larger ones are no faster there, and need more memory. A GPU is faster with few passes: all of a rank's rows in one."""


@dataclass
class TrainSettings(Settings):
    """Optimisation (Section 3.2) and how a global batch is computed."""

    max_steps: int = setting(65536, "optimizer steps", at_least=1)
    epochs: Optional[float] = setting(None, "epochs over the mixture, in place of max_steps", above=0)
    global_batch_size: int = setting(128, "instances per step, whatever the number of ranks", at_least=1)
    micro_batch_size: Optional[int] = setting(
        None,
        "instances per forward pass of a rank; default: train.tokens_per_micro_batch decides",
        at_least=1,
    )
    tokens_per_micro_batch: Optional[str] = setting(
        None,
        "most source and target tokens per forward pass, padding included: a number, or auto (measured once, then kept "
        f"for the run); null: passes of train.micro_batch_size rows, and without that {CPU_TOKENS:,} tokens on a CPU "
        "and all of the rank's rows on a GPU",
    )
    sort_by_length: bool = setting(True, "micro-batches of rows of similar length: the same gradient, less padding")
    learning_rate: float = setting(3e-4, "peak learning rate of AdamW", at_least=0)
    warmup_steps: int = setting(500, "linear warm-up; then linear decay to 0 at max_steps", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", at_least=0)
    adam_epsilon: Literal["corrected", "uncorrected"] = setting(
        "corrected",
        "AdamW's epsilon is added to the bias-corrected second moment (corrected, torch's AdamW) or before the "
        "correction (uncorrected, the paper's release)",
    )
    gradient_clipping: float = setting(1.0, "clip the global gradient norm (0: off)", at_least=0)
    label_smoothing: float = setting(
        0.0, "label smoothing (the release used 0.1 with a summed loss)", at_least=0, at_most=1
    )
    loss_reduction: Literal["mean", "sum"] = setting("mean", "loss over the global batch's target tokens: mean or sum")
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "data type of the frozen base and of the computation: bf16 or fp32; master weights are fp32"
    )
    compile: Literal["off", "on", "auto"] = setting(
        "auto",
        "torch.compile of what is between a layer's matrix products: off, on or auto (on a GPU, if that is faster)",
    )
    self_check: bool = setting(
        True,
        "compare the gradient that DeepSpeed forms in a run's first step with that of plain backward passes over the "
        "same rows; it costs about a step per rank, once",
    )
    deterministic: bool = setting(
        False,
        "the same bits from each run on the same GPUs, a resumed one among them: slower algorithms on a GPU, whose "
        "cost the log prints; a CPU needs nothing for it",
    )
    checkpoint_every: int = setting(1000, "save a checkpoint every this many steps", at_least=1)
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep", at_least=1)
    log_every: int = setting(10, "write metrics every this many steps", at_least=1)

    def validate(self, prefix: str = "train.") -> None:
        """Also check `tokens_per_micro_batch`, which is a number, auto or null."""
        super().validate(prefix)
        value = self.tokens_per_micro_batch
        if value is not None and value != AUTO and not (value.isdigit() and int(value) >= 1):
            raise UserError(
                f"{prefix}tokens_per_micro_batch={value}: must be a number of tokens of at least 1, auto, or null"
            )

    @property
    def tokens_found_automatically(self) -> bool:
        """Whether the run measures how many tokens per pass are best."""
        return self.tokens_per_micro_batch == AUTO

    @property
    def token_budget(self) -> Optional[int]:
        """Most tokens per pass that the settings name; None where they name none."""
        value = self.tokens_per_micro_batch
        return None if value is None or value == AUTO else int(value)

    def default_token_budget(self, device: str) -> Optional[int]:
        """Most tokens per pass where the settings give neither rows nor tokens; None: all of a rank's rows.

        Args:
            device: type of device that computes, "cpu" or "cuda".
        """
        return CPU_TOKENS if device == "cpu" else None

    @property
    def passes_by_device(self) -> bool:
        """Whether neither rows nor tokens per pass are given, so that the device decides."""
        return self.micro_batch_size is None and self.tokens_per_micro_batch is None
