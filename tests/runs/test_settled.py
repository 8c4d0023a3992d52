"""What a run chooses once and keeps."""

from __future__ import annotations

import json

import pytest

from hdscale.errors import UserError
from hdscale.runs.settled import Settled


def test_ranks_keep_what_rank_0_found(rank_pool, tmp_path):
    path = tmp_path / "settled.json"
    for _ in range(2):
        for found in rank_pool(2).run("tests.helpers.engine_jobs:settle", {"path": str(path)}):
            assert found == {"first": 0, "again": 0, "other": "both"}
    assert json.loads(path.read_text()) == {"number": 0, "other": "both"}


@pytest.mark.parametrize("content", ['{"number": ', "[1, 2]"])
def test_a_torn_file_is_one_line(rank_pool, tmp_path, content):
    path = tmp_path / "settled.json"
    path.write_text(content)
    with pytest.raises(UserError, match="settled.json .*; remove it"):
        Settled(path, Alone())


class Alone:
    """One rank."""

    def on_main(self, function, *args):
        return function(*args)
