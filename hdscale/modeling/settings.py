"""Settings of the base model and of the method that adapts it (`model.*`, `method.*`)."""

from dataclasses import dataclass
from typing import Optional

from hdscale.settings import setting


@dataclass
class ModelSettings:
    """The frozen base: a T5-family encoder-decoder."""

    name: str = setting("t5-v1_1-small", "hub id, local folder, or built-in size (random weights) of a T5-family model")
    revision: Optional[str] = setting(None, "revision of the hub checkpoint (branch, tag or commit)")
    tokenizer: Optional[str] = setting(None, "hub id or folder of the tokenizer; default: the model's own")
    attention: str = setting("sdpa", "attention implementation of transformers: sdpa or eager")
    activation_checkpointing: str = setting("none", "recompute activations in: none, encoder, decoder or all")
    dropout: Optional[float] = setting(None, "dropout rate of the base; default: its own (0.1)")
    init_adapter: Optional[str] = setting(None, "folder of exported trainables to start from (warm start)")


@dataclass
class SideSettings:
    """What adapts one side (encoder or decoder) of the base."""

    adapter: str = setting("manual", "kind of adapter: none, manual, task or generated")
    dim: int = setting(64, "adapter size A (bottleneck of the adapter itself)")
    input: str = setting("hidden", "what the adapter reads: hidden (x, Eq. 2) or layernorm (LayerNorm(x), Table 9)")


@dataclass
class HypernetSettings:
    """The hypernetwork (Eq. 3-9)."""

    bottleneck: int = setting(128, "size K of the hypernetwork's hidden layer")
    layer_embedding: int = setting(10, "size of the learned layer embedding")
    conditioning: str = setting("mean", "how the encoding becomes one vector: mean (masked mean over tokens)")
    mlp: bool = setting(True, "pass the pooled encoding through the two-layer MLP of Eq. 8")


@dataclass
class MethodSettings:
    """The adaptation method and its sizes."""

    name: str = setting("hyperdecoder", "method: see `hdscale params --help` for the list")
    encoder: SideSettings = setting(SideSettings, "the encoder's adapters")
    decoder: SideSettings = setting(SideSettings, "the decoder's adapters")
    hypernet: HypernetSettings = setting(HypernetSettings, "the hypernetwork")
    backend: str = setting("auto", "implementation of generated adapters: auto, cpp, cuda or torch")
    budget: Optional[str] = setting(None, "trainable share such as 2.9%: solves for the free size of the method")
