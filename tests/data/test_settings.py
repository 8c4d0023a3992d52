"""Values of `data.*` that are refused, each with its key."""

import pytest

from hdscale.data.settings import DataSettings
from hdscale.errors import UserError


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": 0.0}, "data.temperature=0.0: must be above 0"),
        ({"fraction": 0.0}, "data.fraction=0.0: must be above 0 and at most 1"),
        ({"fraction": 1.1}, "data.fraction=1.1"),
        ({"max_source_length": 1}, "data.max_source_length=1: must be at least 2"),
        ({"max_target_length": 1}, "data.max_target_length=1"),
        ({"chunk_overlap": -1}, "data.chunk_overlap=-1: must be at least 0"),
        ({"glue_protocol": "devs"}, "data.glue_protocol=devs: must be one of paper, dev; did you mean 'dev'"),
        ({"mnli_test": "both"}, "data.mnli_test=both: must be one of matched, mismatched"),
        ({"stsb_step": 0.0}, "data.stsb_step=0.0: must be above 0"),
    ],
)
def test_a_value_out_of_range_is_named(setting: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataSettings(**setting).validate("data.")
