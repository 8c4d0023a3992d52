"""Settings of the base model (`model.*`)."""

from dataclasses import dataclass
from typing import Literal, Optional

from hdscale.settings import Settings, setting


@dataclass
class ModelSettings(Settings):
    """The frozen base: an encoder-decoder."""

    name: str = setting("t5-v1_1-small", "hub id, local folder, or built-in size (random weights)")
    revision: Optional[str] = setting(None, "revision of the hub checkpoint (branch, tag or commit)")
    tokenizer: Optional[str] = setting(None, "hub id or folder of the tokenizer; default: the model's own")
    attention: Literal["sdpa", "eager"] = setting(
        "sdpa", "sdpa: a fused attention of torch; eager: scores as tensors of their own"
    )
    activation_checkpointing: Literal["none", "encoder", "decoder", "all"] = setting(
        "none", "recompute activations in the backward pass of: none, encoder, decoder or all"
    )
    packing: bool = setting(
        False,
        "train the encoder on a micro-batch's tokens as one sequence without padding (for GPUs: FlexAttention); "
        "attention probabilities then have no dropout, and all instances must share the encoder's adapters",
    )
    dropout: Optional[float] = setting(None, "dropout rate of the base; default: its own (0.1)", at_least=0, below=1)
    init_adapter: Optional[str] = setting(None, "folder of exported trainable parameters to start from (warm start)")
