"""LoRA (Hu et al. 2022): learned low-rank updates of the attentions' linears in both stacks."""

from __future__ import annotations

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.lora import LoraAdaptation, LoraLinear, adapted_linears, check_lora
from hdscale.modeling.methods.interface import Encode, Method
from hdscale.modeling.settings import MethodSettings


class Lora(Method):
    """One update for all tasks; q and v of every attention unless configured otherwise."""

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        lora = config.method.lora
        scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
        for name, layers in (("encoder", base.config.num_layers), ("decoder", base.config.num_decoder_layers)):
            linears = adapted_linears(base.config, name == "decoder", lora.targets or "qv", lora.attention or "all")
            self.add_module(
                name,
                nn.ModuleList(
                    nn.ModuleDict({key: LoraLinear(d_in, d_out, lora.rank, scale) for key, d_in, d_out in linears})
                    for _ in range(layers)
                ),
            )

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

    def encode(self, encode: Encode, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        return encode(LoraAdaptation(self.encoder))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation:
        return LoraAdaptation(self.decoder)
