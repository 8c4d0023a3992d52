"""XSum, CNN/DailyMail and English WikiLingua (Section 3.1.3), on their official splits."""

from __future__ import annotations

from hdscale.data.settings import DataSettings
from hdscale.data.task import DecodingLimits, SplitRule, Task
from hdscale.data.tasks.sizes import TABLE_12

MIXTURES = {"summ_nli": ("xsum", "cnn_dailymail", "wiki_lingua", "mnli", "art", "anli")}
MAX_SUMMARY_TOKENS = 60
MIN_LENGTH = 2
"""With the decoder's start token: a summary is never empty."""


def tasks(settings: DataSettings) -> list[Task]:
    """The three declarations; beams are those of the release."""
    return [
        summary("xsum", "EdinburghNLP/xsum", ("default", "data", ""), "document", "summary", beams=6),
        summary(
            "cnn_dailymail",
            "abisee/cnn_dailymail",
            ("3.0.0",),
            "article",
            "highlights",
            beams=4,
            revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        ),
        summary("wiki_lingua", "GEM/wiki_lingua", ("en",), "source", "target", beams=4),
    ]


def summary(
    name: str,
    repo: str,
    configs: tuple[str, ...],
    document: str,
    target: str,
    beams: int,
    revision: str | None = None,
) -> Task:
    """One summarisation task, scored by ROUGE."""
    return Task(
        name=name,
        kind="text",
        splits={split: SplitRule((split,)) for split in ("train", "validation", "test")},
        source="summarize: {" + document + "}",
        target="{" + target + "}",
        metrics=("rouge1", "rouge2", "rougeL", "rougeLsum"),
        # web text: Table 12 counts every row, and a blank one among hundreds of thousands must not stop a run
        may_be_empty=(document, target),
        decoding=DecodingLimits(max_target_length=MAX_SUMMARY_TOKENS, num_beams=beams, min_length=MIN_LENGTH),
        repo=repo,
        configs=configs,
        revision=revision,
        sizes=TABLE_12[name],
    )
