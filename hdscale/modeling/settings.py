"""Settings of the method that adapts the base (`method.*`).

Defaults of `method.*` are the paper's hyperdecoder. A method refuses options that it does not have.
"""

from dataclasses import dataclass, field
from typing import Optional

from hdscale.settings import setting


@dataclass
class SideSettings:
    """What adapts one side (encoder or decoder) of the base."""

    adapter: str = setting("manual", "kind of adapter: none, manual, task or generated")
    dim: int = setting(64, "adapter size A (bottleneck of the adapter itself)")
    input: str = setting("hidden", "what the adapter reads: hidden (x, Eq. 2) or layernorm (LayerNorm(x), Table 9)")
    form: str = setting(
        "adapter", "what a task or generated side generates: adapter, lora, prefix, or several joined by +"
    )
    shared_layers: Optional[str] = setting(
        None, "layers of a task or generated side that have a learned adapter instead, such as 0-5,11"
    )
    scale: float = setting(1.0, "factor on the adapters' output")
    learned_scale: bool = setting(False, "learn that factor, one a layer, from this start")


@dataclass
class HypernetSettings:
    """The hypernetwork (Eq. 3-9)."""

    bottleneck: int = setting(128, "size K of the hypernetwork's hidden layer")
    layer_embedding: int = setting(10, "size of the learned layer embedding")
    conditioning: str = setting(
        "mean", "how the encoding becomes vectors: mean (masked mean over tokens) or attention (learned queries)"
    )
    pools: int = setting(1, "pooled vectors: learned queries, or the means of so many stretches of the source")
    mlp: bool = setting(True, "pass the pooled encoding through the two-layer MLP of Eq. 8")
    per_layer: bool = setting(False, "a hypernetwork of its own for every layer, without layer embeddings")


@dataclass
class LoraSettings:
    """Low-rank updates of attention linears (lora, modular, and generated ones)."""

    rank: int = setting(16, "rank of the update")
    alpha: Optional[float] = setting(None, "the update is scaled by alpha / rank; default: by 1 (modular: by 1 / rank)")
    targets: Optional[str] = setting(None, "adapted linears among q, k, v and o; default: qv (modular: qkvo)")
    attention: Optional[str] = setting(None, "attentions: self, cross or all; default: all (generated: self)")


@dataclass
class PrefixSettings:
    """Generated keys and values before the self-attention's own."""

    length: int = setting(16, "prefix vectors of a layer")


@dataclass
class ModularSettings:
    """The modular task hypernetwork (Ponti et al. 2022; A.3)."""

    skills: int = setting(4, "skills, each a LoRA of every adapted linear")
    temperature: float = setting(1.0, "of the relaxed Bernoulli samples of the allocation in training")
    learning_rate: float = setting(1e-2, "peak learning rate of the task-skill allocation Z")


@dataclass
class HyperformerSettings:
    """Hyperformer and Hyperformer++ (Karimi Mahabadi et al. 2021)."""

    form: str = setting("stack", "hyperformer's hypernetworks: stack (one a stack, as released) or layer (one a layer)")
    dim: int = setting(128, "adapter size A (D / 8 at large)")
    embedding: int = setting(64, "size of the embeddings of task, layer and place, and of the code")
    hidden: int = setting(128, "hidden size of the network that joins the embeddings")


@dataclass
class HyperpromptSettings:
    """HyperPrompt (He et al. 2022b); sizes are guesses: see hdscale/modeling/methods/hyperprompt.py."""

    variant: str = setting(
        "global", "local hypernetworks: share (by the tasks), sep (own per task), global (generated)"
    )
    length: int = setting(16, "prompt vectors of a task")
    bottleneck: int = setting(32, "hidden size of the local hypernetworks")
    embedding: int = setting(64, "size of the embeddings of task and layer, and of their code")
    hidden: int = setting(128, "hidden size of the network that joins the embeddings")
    tune_base: bool = setting(False, "train the whole base as well, as the published results do")


@dataclass
class MethodSettings:
    """The adaptation method and its sizes."""

    name: str = setting(
        "hyperdecoder",
        "method: hyperdecoder, adapter, task_hypernet, modular, lora, hyperformer, hyperformer++, hyperprompt, full_finetuning",
    )
    encoder: SideSettings = setting(SideSettings, "the encoder's adapters")
    decoder: SideSettings = field(
        default_factory=lambda: SideSettings(adapter="generated"), metadata={"help": "the decoder's adapters"}
    )
    hypernet: HypernetSettings = setting(HypernetSettings, "the hypernetwork")
    lora: LoraSettings = setting(LoraSettings, "low-rank updates")
    prefix: PrefixSettings = setting(PrefixSettings, "generated prefixes")
    modular: ModularSettings = setting(ModularSettings, "the modular task hypernetwork")
    hyperformer: HyperformerSettings = setting(HyperformerSettings, "Hyperformer and Hyperformer++")
    hyperprompt: HyperpromptSettings = setting(HyperpromptSettings, "HyperPrompt")
    backend: str = setting("auto", "implementation of generated adapters: auto, cpp, cuda or torch")
    budget: Optional[str] = setting(None, "trainable share such as 2.9%: solves for the free size of the method")
    solve: Optional[str] = setting(
        None, "size that the budget solves for, such as decoder.dim; default: the method's own"
    )
