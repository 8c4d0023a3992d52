"""hdscale: train hyperdecoders (instance-specific decoders for T5) at cluster scale.

from hdscale import HyperdecoderConfig, build_model, from_pretrained
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdscale.bases.settings import ModelSettings
    from hdscale.cluster.settings import ClusterSettings
    from hdscale.config import Config
    from hdscale.data.settings import DataSettings
    from hdscale.engine.settings import TrainSettings
    from hdscale.evaluation.settings import EvalSettings
    from hdscale.modeling import AdaptedModel, HyperdecoderConfig, ModelOutput, build_model, from_pretrained
    from hdscale.modeling.settings import HypernetSettings, MethodSettings, SideSettings
    from hdscale.runs.settings import RunSettings

__version__ = "0.2.0.dev0"
__all__ = [
    "AdaptedModel",
    "ClusterSettings",
    "Config",
    "DataSettings",
    "EvalSettings",
    "HyperdecoderConfig",
    "HypernetSettings",
    "MethodSettings",
    "ModelOutput",
    "ModelSettings",
    "RunSettings",
    "SideSettings",
    "TrainSettings",
    "build_model",
    "from_pretrained",
]

HOMES = {
    "ClusterSettings": "hdscale.cluster.settings",
    "Config": "hdscale.config",
    "DataSettings": "hdscale.data.settings",
    "EvalSettings": "hdscale.evaluation.settings",
    "HypernetSettings": "hdscale.modeling.settings",
    "MethodSettings": "hdscale.modeling.settings",
    "ModelSettings": "hdscale.bases.settings",
    "RunSettings": "hdscale.runs.settings",
    "SideSettings": "hdscale.modeling.settings",
    "TrainSettings": "hdscale.engine.settings",
}
"""The modules of the names that are not of `hdscale.modeling`."""


def __getattr__(name: str) -> Any:
    # on first use only: reading a configuration or `hdscale --help` must not wait for torch
    if name in __all__:
        return getattr(import_module(HOMES.get(name, "hdscale.modeling")), name)
    raise AttributeError(f"module 'hdscale' has no attribute '{name}'")
