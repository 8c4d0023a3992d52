"""hdscale: train hyperdecoders (instance-specific decoders for T5) at cluster scale.

from hdscale import HyperdecoderConfig, build_model, from_pretrained
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["AdaptedModel", "HyperdecoderConfig", "ModelOutput", "build_model", "from_pretrained"]


def __getattr__(name: str) -> Any:
    # on first use only: reading a configuration or `hdscale --help` must not wait for torch
    if name in __all__:
        from hdscale import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module 'hdscale' has no attribute '{name}'")
