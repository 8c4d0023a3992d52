"""What a run has to remember beside weights and moments."""

from __future__ import annotations

import dataclasses

Metrics = dict[str, dict[str, float]]
"""{task: {metric: score x100}}"""


@dataclasses.dataclass
class RunState:
    """Saved in each checkpoint's `state.json`.

    Attributes:
        evaluated: step of the last evaluation on the validation sets.
        best: {what is selected by: {"score", "step"}}; one entry, or one per task with `eval.select=per_task`.
        validation: metrics of the last evaluation.
        seconds, samples, tokens: spent on training so far, over all sessions.
    """

    evaluated: int = 0
    best: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    validation: Metrics = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
