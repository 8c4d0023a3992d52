"""Where the repository, its shipped configurations and the real text are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DATA = Path(os.environ.get("HDSCALE_TEST_DATA") or ROOT.parent / "shared" / "data")
HUB = DATA / "hub"
T5_TOKENIZER = DATA / "t5_tokenizer"

needs_real_text = pytest.mark.skipif(
    not (HUB / "nyu-mll").is_dir() or not T5_TOKENIZER.is_dir(),
    reason=f"no real text at {DATA}; set HDSCALE_TEST_DATA to a folder with hub/ and t5_tokenizer/",
)
