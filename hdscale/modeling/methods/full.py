"""Full fine-tuning: every parameter of the base is trained (tied ones once)."""

from __future__ import annotations

from hdscale.bases.interface import Base
from hdscale.modeling.methods.interface import Method
from hdscale.modeling.settings import MethodSettings


class FullFinetuning(Method):
    """The base itself, with every parameter trained."""

    trains_base = True

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        return False

    def base_trainables(self, base: Base) -> list[str]:
        return [name for name, _ in base.named_parameters()]
