"""The twelve sets of the MRQA 2019 shared task as tasks (Section 3.1.2, Tables 4 and 5)."""

from __future__ import annotations

from hdscale.data.settings import DataSettings
from hdscale.data.task import DecodingLimits, SplitRule, Task
from hdscale.data.tasks.mrqa.reader import MrqaReader
from hdscale.data.tasks.sizes import TABLE_11

REPO = "mrqa-workshop/mrqa"
IN_DOMAIN = {
    "squad": "SQuAD",
    "hotpotqa": "HotpotQA",
    "triviaqa": "TriviaQA-web",
    "newsqa": "NewsQA",
    "searchqa": "SearchQA",
    "naturalquestions": "NaturalQuestionsShort",
}
"""{task: name of its files and of the hub's subset}: trained on and evaluated on (Table 4)."""
OUT_OF_DOMAIN = {
    "bioasq": "BioASQ",
    "drop": "DROP",
    "duorc": "DuoRC.ParaphraseRC",
    "race": "RACE",
    "relationextraction": "RelationExtraction",
    "textbookqa": "TextbookQA",
}
"""Only evaluated on (Table 5)."""
MIXTURES = {
    "mrqa": (*IN_DOMAIN, *OUT_OF_DOMAIN),
    "mrqa_in_domain": tuple(IN_DOMAIN),
    "mrqa_out_of_domain": tuple(OUT_OF_DOMAIN),
}
MAX_ANSWER_TOKENS = 64
TEMPLATE = "question: {question} context: {context}"


def tasks(settings: DataSettings) -> list[Task]:
    """The twelve declarations. A set has one labelled evaluation split, which both validates and tests."""
    return [declare(name, stem, "validation") for name, stem in IN_DOMAIN.items()] + [
        declare(name, stem, "test") for name, stem in OUT_OF_DOMAIN.items()
    ]


def declare(name: str, stem: str, evaluated_on: str) -> Task:
    """One set as a task; only in-domain sets train."""
    sizes = dict(TABLE_11[name])
    sizes["test"] = sizes["validation"]
    train = {"train": SplitRule(("train",))} if name in IN_DOMAIN else {}
    return Task(
        name=name,
        kind="qa",
        splits=train | {split: SplitRule((evaluated_on,)) for split in ("validation", "test")},
        source=TEMPLATE,
        target="",
        metrics=("em", "f1"),
        decoding=DecodingLimits(max_target_length=MAX_ANSWER_TOKENS),
        repo=REPO,
        configs=("plain_text", "default", "data", ""),
        reader=MrqaReader(),
        options={"set": stem},
        sizes=sizes,
    )
