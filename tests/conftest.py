"""Fixtures that every room's tests share, and the record of a whole run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> RankPool:
    """Ranks without the cost of a launch: `rank_pool(2).run("tests.module:function", kwargs)`.

    See tests/helpers/ranks.py.
    """
    return RankPool()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write a summary of the run to this file")
    parser.addoption("--record-of", metavar="TARGET", default="test-all", help="the Makefile's target in that summary")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.time()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        # torch is imported for its GPUs: only where a test needs one
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        # torch is imported for its version: only where a record is wanted
        from tests.helpers.record import summary

        text = summary(
            terminalreporter.stats,
            time.time() - config.stash[STARTED],
            config.rootpath,
            config.getoption("--record-of"),
        )
        Path(path).write_text(text, encoding="utf-8")


STARTED = pytest.StashKey[float]()
