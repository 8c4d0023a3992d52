"""LoRA (Hu et al. 2022): learned low-rank updates of the attentions' linears in both stacks."""

from __future__ import annotations

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation, Base, StackSizes
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.lora import LoraAdaptation, LoraLinear, adapted_linears, check_lora
from hdscale.modeling.methods.interface import Method, RunEncoder
from hdscale.modeling.settings import LoraSettings, MethodSettings


def lora_layers(lora: LoraSettings, sizes: StackSizes) -> nn.ModuleList:
    """For each layer of a stack the updates of its linears by key; q and v of every attention by default."""
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    linears = adapted_linears(sizes, lora.targets or "qv", lora.attention or "all")
    return nn.ModuleList(
        nn.ModuleDict({key: LoraLinear(d_in, d_out, lora.rank, scale) for key, d_in, d_out in linears})
        for _ in range(sizes.layers)
    )


class Lora(Method):
    """Learned updates that all tasks share."""

    def __init__(self, config: HyperdecoderConfig, base: Base) -> None:
        super().__init__(config, base)
        self.encoder = lora_layers(config.method.lora, base.sizes("encoder"))
        self.decoder = lora_layers(config.method.lora, base.sizes("decoder"))

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        return ["lora"]

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        return [["lora.rank"]]

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        return False

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        check_lora(config.method.lora)

    def encode(self, run_encoder: RunEncoder, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        return run_encoder(LoraAdaptation(self.encoder))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation:
        return LoraAdaptation(self.decoder)
