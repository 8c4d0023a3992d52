"""Names of tasks in the paper's release, in MRQA's files and on the hub."""

from __future__ import annotations

from hdscale.data.tasks import get_task
from hdscale.data.tasks.aliases import ALIASES, canonical


def test_every_alias_is_of_a_task_of_the_package() -> None:
    assert {get_task(name).name for name in ALIASES.values()} == set(ALIASES.values())


def test_the_names_of_the_release_and_of_mrqa() -> None:
    names = ["HotpotQA", "NaturalQuestionsShort", "SQuAD", "TriviaQA-web", "wiki_lingua_english_en"]
    assert [canonical(name) for name in names] == ["hotpotqa", "naturalquestions", "squad", "triviaqa", "wiki_lingua"]
    assert canonical("rte") == "rte" and canonical("a task of one's own") == "a task of one's own"
