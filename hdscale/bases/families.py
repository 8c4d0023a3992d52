"""The families of bases: one file and one entry here for each."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from hdscale.bases.t5 import T5

FAMILIES: dict[str, Any] = {"t5": T5, "mt5": T5, "umt5": T5}
"""The class of `Base` for each model type of transformers (T5 v1.0, v1.1, LM-adapted, FLAN and ByT5 are all "t5").
It is called with the configuration, and with whether the head has weights of its own."""


def family_of(config: PretrainedConfig) -> Any:
    """The class for a base with this configuration."""
    return FAMILIES[config.model_type]
