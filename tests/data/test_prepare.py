"""Which tasks' data `hdscale prepare` fetches."""

from __future__ import annotations

import pytest

from hdscale.data.prepare import needs_hub
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import get_task
from hdscale.data.tasks.custom import task_from_mapping

QUESTIONS = {"kind": "qa", "source": "{question} {context}", "target": "{answer}"}
FROM_HUB = task_from_mapping({**QUESTIONS, "repo": "someone/questions"}, "from_hub")
OWN_FILES = task_from_mapping({**QUESTIONS, "files": {"train": "questions.jsonl"}}, "own_files")


@pytest.mark.parametrize(
    ("task", "fetched", "fetched_beside_mrqa"),
    [
        (get_task("squad"), True, False),
        (get_task("rte"), True, True),
        (FROM_HUB, True, True),
        (OWN_FILES, False, False),
        (get_task("quick_sentiment"), False, False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_shared_tasks_folder_holds_its_own_sets_only(task, fetched, fetched_beside_mrqa):
    """Fails where every question-answering task is taken for one of the shared task's sets."""
    assert needs_hub(task, DataSettings()) == fetched
    assert needs_hub(task, DataSettings(mrqa_root="mrqa")) == fetched_beside_mrqa
