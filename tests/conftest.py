"""Fixtures that every room's tests share."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> RankPool:
    """Ranks without the cost of a launch: `rank_pool(2).run("tests.module:function", kwargs)`; see tests/helpers/ranks.py."""
    return RankPool()
