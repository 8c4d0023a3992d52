"""Settings of the data (`data.*`)."""

from dataclasses import dataclass
from typing import Any, Optional

from hdscale.settings import setting


@dataclass
class DataSettings:
    """Tasks, where their rows come from, and how text becomes tensors."""

    tasks: list[Any] = setting(
        ["cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "qnli", "rte"],
        "names of tasks (or of mixtures: glue, mrqa, summ_nli, quickstart) to train and evaluate on",
    )
    custom: dict[str, Any] = setting(
        {}, "your own tasks: {name: declaration} (docs/tasks.md), to be named in data.tasks"
    )
    mixtures: dict[str, Any] = setting({}, "your own mixtures: {name: [names of tasks]}, to be named in data.tasks")
    root: Optional[str] = setting(None, "folder that mirrors the hub's layout; default: the hub itself")
    revision: Optional[str] = setting(None, "revision of the hub data sets; default: each task's pinned one")
    revisions: dict[str, str] = setting({}, "revision of single hub data sets: {repository: branch, tag or commit}")
    mrqa_root: Optional[str] = setting(
        None,
        "folder of the MRQA shared task's files, {train,dev}/<Set>.jsonl.gz; default: <data.root>/mrqa, "
        "else the hub's form",
    )
    chunk_overlap: int = setting(128, "context tokens that neighbouring chunks share (chunked QA tasks)")
    cache: Optional[str] = setting(None, "folder of tokenised data; default: $HDSCALE_CACHE or ~/.cache/hdscale")
    max_source_length: int = setting(128, "source tokens kept, </s> included")
    max_target_length: int = setting(16, "target tokens kept, </s> included")
    temperature: float = setting(1.0, "mixture: rows are drawn in proportion to size ** (1 / temperature)")
    single_task_batches: bool = setting(
        False, "every global batch holds one task, drawn by the same shares (Hyperformer's own setting)"
    )
    task_prefix: bool = setting(
        True, "sources of GLUE and NLI begin with the task's name (Hyperformer's authors leave it out)"
    )
    fraction: float = setting(1.0, "share of each training set that is used (data scaling studies)")
    stsb_step: float = setting(0.2, "STS-B scores are rounded to this step (T5: 0.2; the paper's release: 0.1)")
    mnli_test: str = setting("matched", "MNLI test split: matched (Tables 10, 12) or mismatched (text of 3.1.1)")
    glue_protocol: str = setting("paper", "splits: paper (3.1.1) or dev (Table 2: GLUE's own dev sets)")
