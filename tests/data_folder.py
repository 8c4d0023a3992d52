"""Real text for tests: the folder named by HDSCALE_TEST_DATA, by default ../shared/data beside the
repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("HDSCALE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
HUB = FOLDER / "hub"
TOKENIZER = FOLDER / "t5_tokenizer"

needs_data = pytest.mark.skipif(
    not (HUB / "nyu-mll" / "glue").is_dir() or not TOKENIZER.is_dir(),
    reason=f"no data at {FOLDER}: set HDSCALE_TEST_DATA to a folder with hub/ and t5_tokenizer/",
)
