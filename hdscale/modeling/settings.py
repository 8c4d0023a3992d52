"""Settings of the method that adapts the base (`method.*`).

Defaults of `method.*` are the paper's hyperdecoder. A method refuses options that it does not have.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Optional

from hdscale.errors import UserError
from hdscale.settings import Settings, setting

FORMS = ("adapter", "lora", "prefix")
LINEARS = ("q", "k", "v", "o")


@dataclass
class SideSettings(Settings):
    """What adapts one side (encoder or decoder) of the base."""

    adapter: Literal["none", "manual", "task", "generated"] = setting(
        "manual", "kind of adapter: none, manual, task or generated"
    )
    dim: int = setting(64, "adapter size A (bottleneck of the adapter itself)", at_least=1)
    input: Literal["hidden", "layernorm"] = setting(
        "hidden", "what the adapter reads: hidden (x, Eq. 2) or layernorm (LayerNorm(x), Table 9)"
    )
    form: str = setting(
        "adapter", "what a task or generated side generates: adapter, lora, prefix, or several joined by +"
    )
    shared_layers: Optional[str] = setting(
        None, "layers of a task or generated side that have a learned adapter instead, such as 0-5,11"
    )
    scale: float = setting(1.0, "factor on the adapters' output", above=-math.inf, below=math.inf)
    learned_scale: bool = setting(False, "learn that factor, one per layer, starting from `scale`")

    def validate(self, prefix: str = "") -> None:
        """Also check that `form` names each of its parts once."""
        super().validate(prefix)
        parts = self.form.split("+")
        if set(parts) - set(FORMS) or len(set(parts)) < len(parts):
            raise UserError(f"{prefix}form={self.form}: write {', '.join(FORMS)}, or several of them joined by +")


@dataclass
class HypernetSettings(Settings):
    """The hypernetwork (Eq. 3-9)."""

    bottleneck: int = setting(128, "size K of the hypernetwork's hidden layer", at_least=1)
    layer_embedding: int = setting(10, "size of the learned layer embedding", at_least=0)
    conditioning: Literal["mean", "attention"] = setting(
        "mean", "how the encoding becomes vectors: mean (masked mean over tokens) or attention (learned queries)"
    )
    pools: int = setting(
        1, "number of pooled vectors: learned queries, or the means of as many equal segments of the source", at_least=1
    )
    mlp: bool = setting(True, "pass the pooled encoding through the two-layer MLP of Eq. 8")
    per_layer: bool = setting(False, "a separate hypernetwork for every layer, without layer embeddings")


@dataclass
class LoraSettings(Settings):
    """Low-rank updates of attention linears (lora, modular, and generated ones)."""

    rank: int = setting(16, "rank of the update", at_least=1)
    alpha: Optional[float] = setting(None, "the update is scaled by alpha / rank; default: by 1 (modular: by 1 / rank)")
    targets: Optional[str] = setting(None, "adapted linears among q, k, v and o; default: qv (modular: qkvo)")
    attention: Optional[Literal["self", "cross", "all"]] = setting(
        None, "adapted attentions: self, cross or all; default: all (generated: self)"
    )

    def validate(self, prefix: str = "") -> None:
        """Also check the letters of `targets`."""
        super().validate(prefix)
        targets = self.targets
        if targets is not None and (not targets or set(targets) - set(LINEARS) or len(set(targets)) < len(targets)):
            raise UserError(f"{prefix}targets={targets}: write letters among q, k, v and o, each once, such as qv")


@dataclass
class PrefixSettings(Settings):
    """Generated keys and values before the self-attention's own."""

    length: int = setting(16, "prefix vectors per layer", at_least=1)


@dataclass
class ModularSettings(Settings):
    """The modular task hypernetwork (Ponti et al. 2022; A.3)."""

    skills: int = setting(4, "skills, each a LoRA of every adapted linear", at_least=1)
    temperature: float = setting(1.0, "temperature of the relaxed Bernoulli samples of the allocation", above=0)
    learning_rate: float = setting(1e-2, "peak learning rate of the task-skill allocation Z", above=0)


@dataclass
class HyperformerSettings(Settings):
    """Hyperformer and Hyperformer++ (Karimi Mahabadi et al. 2021)."""

    form: Literal["stack", "layer"] = setting(
        "stack", "hyperformer's hypernetworks: stack (one per encoder or decoder, as released) or layer (one per layer)"
    )
    dim: int = setting(128, "adapter size A (D / 8 at large)", at_least=1)
    embedding: int = setting(64, "size of the embeddings of task, layer and position, and of the code", at_least=1)
    hidden: int = setting(128, "hidden size of the network that joins the embeddings", at_least=1)


@dataclass
class HyperpromptSettings(Settings):
    """HyperPrompt (He et al. 2022b); sizes are guesses: see hdscale/modeling/methods/hyperprompt.py."""

    variant: Literal["share", "sep", "global"] = setting(
        "global",
        "local hypernetworks: share (one for all tasks), sep (one per task), global (generated by a global one)",
    )
    length: int = setting(16, "prompt vectors per task", at_least=1)
    bottleneck: int = setting(32, "hidden size of the local hypernetworks", at_least=1)
    embedding: int = setting(64, "size of the embeddings of task and layer, and of their code", at_least=1)
    hidden: int = setting(128, "hidden size of the network that joins the embeddings", at_least=1)
    tune_base: bool = setting(False, "train the whole base as well, as the published results do")


@dataclass
class MethodSettings(Settings):
    """The adaptation method and its sizes."""

    name: Literal[
        "hyperdecoder",
        "adapter",
        "task_hypernet",
        "modular",
        "lora",
        "hyperformer",
        "hyperformer++",
        "hyperprompt",
        "full_finetuning",
    ] = setting(
        "hyperdecoder",
        "method: hyperdecoder, adapter, task_hypernet, modular, lora, hyperformer, hyperformer++, hyperprompt, "
        "full_finetuning",
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
    backend: Literal["auto", "cpp", "cuda", "torch"] = setting(
        "auto", "implementation of generated adapters: auto, cpp, cuda or torch"
    )
    budget: Optional[str] = setting(None, "trainable share such as 2.9%: solves for the free size of the method")
    solve: Optional[str] = setting(
        None, "size that the budget solves for, such as decoder.dim; default: the method's own"
    )
