"""Settings of the data (`data.*`)."""

from dataclasses import dataclass
from typing import Any, Literal, Optional

from hdscale.settings import Settings, setting


@dataclass
class DataSettings(Settings):
    """Tasks, where their rows come from, and how text becomes tensors."""

    tasks: list[Any] = setting(
        ["cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "qnli", "rte"],
        "names of tasks (or of mixtures: glue, mrqa, summ_nli, quickstart) to train and evaluate on",
    )
    custom: dict[str, Any] = setting(
        {}, "your own tasks: {name: declaration} (docs/tasks.md), to be named in data.tasks"
    )
    mixtures: dict[str, Any] = setting({}, "your own mixtures: {name: [names of tasks]}, to be named in data.tasks")
    root: Optional[str] = setting(None, "local folder with the hub's layout; default: the hub itself")
    revision: Optional[str] = setting(None, "revision of the hub data sets; default: each task's pinned one")
    revisions: dict[str, str] = setting({}, "revision of single hub data sets: {repository: branch, tag or commit}")
    mrqa_root: Optional[str] = setting(
        None,
        "folder of the MRQA shared task's files, {train,dev}/<Set>.jsonl.gz; default: <data.root>/mrqa, "
        "or the files on the hub",
    )
    chunk_overlap: int = setting(
        128, "context tokens that neighbouring chunks share (chunked question-answering tasks)", at_least=0
    )
    cache: Optional[str] = setting(
        None, "folder of tokenised data; default: $HDSCALE_CACHE, else $XDG_CACHE_HOME/hdscale, else ~/.cache/hdscale"
    )
    max_source_length: int = setting(128, "most source tokens per row, </s> included", at_least=2)
    max_target_length: int = setting(16, "most target tokens per row, </s> included", at_least=2)
    temperature: float = setting(
        1.0,
        "mixture: rows are drawn in proportion to size ** (1 / temperature); 1 keeps the sizes' proportions",
        above=0,
    )
    single_task_batches: bool = setting(
        False, "each global batch has a single task, drawn with the same shares (Hyperformer's own setting)"
    )
    task_prefix: bool = setting(
        True, "sources of GLUE and NLI begin with the task's name (Hyperformer's authors leave it out)"
    )
    fraction: float = setting(1.0, "share of each training set that is used (data scaling studies)", above=0, at_most=1)
    stsb_step: float = setting(
        0.2, "STS-B scores are rounded to this step (T5: 0.2; the paper's release: 0.1)", above=0, at_most=5
    )
    mnli_test: Literal["matched", "mismatched"] = setting(
        "matched", "MNLI test split: matched (Tables 10, 12) or mismatched (text of Section 3.1.1)"
    )
    glue_protocol: Literal["paper", "dev"] = setting(
        "paper", "splits: paper (Section 3.1.1) or dev (Table 2: GLUE's own development sets)"
    )
