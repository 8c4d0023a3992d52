"""Settings of evaluation (`eval.*`)."""

from dataclasses import dataclass
from typing import Literal, Optional

from hdscale.settings import Settings, setting


@dataclass
class EvalSettings(Settings):
    """When, on how much and how the model is evaluated by generation."""

    every: int = setting(1000, "evaluate on the validation sets every this many steps (0: only at the end)", at_least=0)
    limit: Optional[int] = setting(
        None, "validation rows per task, a seeded sample (the test is always complete); default: all", at_least=1
    )
    test_limit: Optional[int] = setting(
        None, "test rows per task, a seeded sample, for trial runs; default: all", at_least=1
    )
    batch_size: Optional[int] = setting(
        None,
        "rows per evaluation batch; default: the largest power of two that fits, found once and stored in the run",
        at_least=1,
    )
    select: str = setting(
        "average",
        "which checkpoint is best: average (over tasks), metrics (mean over all metrics), per_task, a metric name, "
        "or last",
    )
    num_beams: int = setting(1, "beams where the task does not state its own", at_least=1)
    count_start_token: bool = setting(
        False, "the most tokens of a prediction include the decoder's start token, as in the paper's release: one less"
    )
    test: bool = setting(True, "evaluate the test sets at the end")
    mrqa_score: Literal["sum", "mean"] = setting(
        "sum", "how a chunk's answer is scored: sum of its tokens' log-likelihoods, or mean over its tokens"
    )
    mrqa_empty: bool = setting(
        True,
        "a chunk may be answered with the empty string; if not, </s> cannot come first, and the first token's "
        "probability is among the others, as in the paper's release (needs one more pass of the encoder)",
    )
