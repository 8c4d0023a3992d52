"""The methods of the paper and its baselines, and the model that they adapt.

Shapes: B batch, S source, T target, D d_model, A adapter size, K hypernetwork bottleneck, N layers, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdscale.modeling.config import HyperdecoderConfig
    from hdscale.modeling.model import AdaptedModel, ModelOutput, build_model, from_pretrained

__all__ = ["AdaptedModel", "HyperdecoderConfig", "ModelOutput", "build_model", "from_pretrained"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Importing only the settings must not import torch and transformers, which takes seconds.
    """
    if name not in __all__:
        raise AttributeError(f"module 'hdscale.modeling' has no attribute {name!r}")
    module = "config" if name == "HyperdecoderConfig" else "model"
    return getattr(importlib.import_module(f"hdscale.modeling.{module}"), name)
