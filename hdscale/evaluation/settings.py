"""Settings of evaluation (`eval.*`)."""

from dataclasses import dataclass
from typing import Optional

from hdscale.settings import setting


@dataclass
class EvalSettings:
    """When, on how much and how the model is evaluated by generation."""

    every: int = setting(1000, "evaluate on the validation sets every so many steps (0: only at the end)")
    limit: Optional[int] = setting(None, "at most so many validation rows a task (the test is always whole)")
    test_limit: Optional[int] = setting(None, "at most so many test rows a task (for trial runs)")
    batch_size: Optional[int] = setting(
        None,
        "rows of one evaluation batch; default: the largest power of two that fits, found once and stored in the run",
    )
    select: str = setting(
        "average",
        "which checkpoint is best: average (over tasks), metrics (mean over all metrics), per_task, a metric "
        "name, or last",
    )
    num_beams: int = setting(1, "beams where the task does not state its own")
    test: bool = setting(True, "evaluate the test sets at the end")
    mrqa_score: str = setting(
        "sum", "a chunk's answer counts by its token log-likelihood: sum, or mean over its tokens"
    )
