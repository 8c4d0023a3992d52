"""The modeling room: what the paper defines.

Shapes: B batch, S source, T target, D d_model, A adapter size, K hypernetwork bottleneck, N layers, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdscale.modeling.config import HyperdecoderConfig
    from hdscale.modeling.export import from_pretrained
    from hdscale.modeling.model import AdaptedModel, ModelOutput, build_model

__all__ = ["AdaptedModel", "HyperdecoderConfig", "ModelOutput", "build_model", "from_pretrained"]

_HOMES = {"HyperdecoderConfig": "config", "from_pretrained": "export"}  # the others live in model.py


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    `hdscale.config` needs only this room's settings, and the commands that read nothing but a configuration must not
    wait for torch and transformers.
    """
    if name not in __all__:
        raise AttributeError(f"module 'hdscale.modeling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hdscale.modeling.{_HOMES.get(name, 'model')}"), name)
