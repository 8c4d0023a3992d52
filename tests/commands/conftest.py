"""Fixtures of the commands' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.run_folder import make_run_folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a finished run of tasks `pairs` and `squad`; see tests/helpers/run_folder.py."""
    return make_run_folder(tmp_path_factory.mktemp("runs") / "tiny", tmp_path_factory.mktemp("data"))
