"""What a run has to remember beside weights and moments."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class RunState:
    """Saved in each checkpoint's `state.json`.

    Attributes:
        evaluated: step of the last evaluation on the validation sets.
        best: {what is selected by: {"score", "step"}}; one entry, or one per task with `eval.select=per_task`.
        selected: {task: its `Score` on the validation set at the step that is selected, as a dictionary}.
        seconds, samples, tokens: spent on training so far, over all sessions.
    """

    evaluated: int = 0
    best: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    selected: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> RunState:
        """The state of a checkpoint; that of 0.1 also has the metrics of the last evaluation, which are not kept."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in tree.items() if name in known})
