"""Declarations: text format, splits, labels, numbers, names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdscale.data.settings import DataSettings
from hdscale.data.task import round_to_step
from hdscale.data.tasks import SplitRule, expand_tasks, get_task, registry
from hdscale.data.tasks.sizes import TABLE_10, TABLE_11, TABLE_12
from hdscale.errors import UserError

ROWS = {
    "cola": ({"sentence": "It ran.", "label": 1}, "cola sentence: It ran.", "1"),
    "sst2": ({"sentence": "fine {fun}", "label": 0}, "sst2 sentence: fine {fun}", "0"),
    "stsb": (
        {"sentence1": "A.", "sentence2": "B.", "label": 3.84},
        "stsb sentence1: A. sentence2: B.",
        "3.8",
    ),
    "mrpc": ({"sentence1": "A.", "sentence2": "B.", "label": 1}, "mrpc sentence1: A. sentence2: B.", "1"),
    "qqp": ({"question1": "A?", "question2": "B?", "label": 0}, "qqp question1: A? question2: B?", "0"),
    "mnli": ({"premise": "P", "hypothesis": "H", "label": 2}, "mnli premise: P hypothesis: H", "2"),
    "qnli": ({"question": "Q?", "sentence": "S.", "label": 1}, "qnli question: Q? sentence: S.", "1"),
    "rte": ({"sentence1": "A.", "sentence2": "B.", "label": 0}, "rte sentence1: A. sentence2: B.", "0"),
    "anli": ({"premise": "P", "hypothesis": "H", "label": 1}, "anli premise: P hypothesis: H", "1"),
    "art": (
        {"observation_1": "a", "observation_2": "b", "hypothesis_1": "c", "hypothesis_2": "d", "label": 2},
        "art observation 1: a observation 2: b hypothesis 1: c hypothesis 2: d",
        "2",
    ),
    "xsum": ({"document": "Long.", "summary": "Short."}, "summarize: Long.", "Short."),
    "cnn_dailymail": ({"article": "Long.", "highlights": "A\nB"}, "summarize: Long.", "A\nB"),
    "wiki_lingua": ({"source": "Long.", "target": "Short."}, "summarize: Long.", "Short."),
}
OFFICIAL = {
    "cola": {"train": 8551, "validation": 1043},
    "sst2": {"train": 67349, "validation": 872},
    "stsb": {"train": 5749, "validation": 1500},
    "mrpc": {"train": 3668, "validation": 408},
    "qqp": {"train": 363846, "validation": 40430},
    "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    "qnli": {"train": 104743, "validation": 5463},
    "rte": {"train": 2490, "validation": 277},
    "art": {"train": 169654, "validation": 1532},
    "anli": {
        **{"train_r1": 16946, "train_r2": 45460, "train_r3": 100459},
        **{f"{split}_r{number}": 1000 if number < 3 else 1200 for split in ("dev", "test") for number in (1, 2, 3)},
    },
}
"""Rows of the data sets' own splits."""


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_the_papers_text(name):
    row, source, target = ROWS[name]
    example = get_task(name).example(row, id="train-0", where="here")
    assert (example.source, example.target, example.task, example.id) == (source, target, name, "train-0")


@pytest.mark.parametrize("name", OFFICIAL)
def test_splits_of_the_full_data_have_the_sizes_of_the_tables(name):
    task = get_task(name)
    counted = {
        split: rule.size(sum(OFFICIAL[name][origin] for origin in rule.origins)) for split, rule in task.splits.items()
    }
    assert counted == dict(task.sizes) == (TABLE_10 | TABLE_12)[name]


def test_tables_agree_on_what_they_share():
    assert TABLE_10["mnli"] == TABLE_12["mnli"]
    assert len(TABLE_11) == 12 and sum("train" in sizes for sizes in TABLE_11.values()) == 6


@given(total=st.integers(2, 5000), rows=st.integers(1, 1500), seed=st.integers(0, 9))
def test_parts_of_a_set_are_disjoint_and_whole(total, rows, seed):
    for first, second in (("first_half", "second_half"), ("held_out", "remainder")):
        parts = [SplitRule(("train",), part, rows, seed).select(total) for part in (first, second)]
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(total))
        assert all(np.all(np.diff(part) > 0) for part in parts)
    assert SplitRule(("train",), "held_out", rows).size(total) == min(rows, total // 2)


def test_halves_are_shuffled_by_seed_42():
    half = SplitRule(("validation",), "first_half").select(1043)
    assert len(half) == 521 and not np.array_equal(half, np.arange(521))
    assert np.array_equal(half, SplitRule(("validation",), "first_half", seed=42).select(1043))
    assert not np.array_equal(half, SplitRule(("validation",), "first_half", seed=43).select(1043))


def test_mnli_test_set_is_a_setting():
    tables = get_task("mnli")
    assert tables.splits["test"].origins == ("validation_matched",)
    assert tables.splits["validation"].origins == ("validation_mismatched",)
    text = get_task("mnli", DataSettings(mnli_test="mismatched"))
    assert text.splits["test"].origins == ("validation_mismatched",)
    assert (text.sizes["test"], text.sizes["validation"]) == (9832, 9815)


def test_dev_protocol_scores_on_glues_own_dev_sets():
    for task in expand_tasks(["glue"], DataSettings(glue_protocol="dev")):
        assert task.splits["train"] == SplitRule(("train",))
        assert task.splits["validation"] == task.splits["test"]
        own = "validation_matched" if task.name == "mnli" else "validation"
        assert task.splits["test"] == SplitRule((own,)) and not task.sizes


def test_stsb_scores_are_t5s_26_strings():
    strings = {round_to_step(score, 0.2) for score in np.linspace(0, 5, 5001)}
    assert strings == {f"{tenth / 10:.1f}" for tenth in range(0, 51, 2)} and len(strings) == 26
    row = {"sentence1": "A.", "sentence2": "B.", "label": 3.25}
    assert get_task("stsb").example(row, "0", "here").target == "3.2"
    assert get_task("stsb", DataSettings(stsb_step=0.1)).example({**row, "label": 3.84}, "0", "").target == "3.8"


@given(st.floats(0, 5))
def test_rounding_is_t5s(score):
    assert round_to_step(score, 0.2) == f"{np.round(score * 5) / 5:.1f}"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", {"sentence1": "A", "sentence2": "B", "label": -1}, "label '-1' .*0, 1.*hidden"),
        ("mnli", {"premise": "A", "hypothesis": "B", "label": 3}, "label '3' .*0, 1, 2"),
        ("art", {**ROWS["art"][0], "label": 0}, "label '0' .*1, 2"),
        ("rte", {"sentence1": "A", "sentence2": " \n", "label": 1}, "'sentence2' .* empty"),
        ("cola", {"sentence": None, "label": 1}, "'sentence' .* empty"),
        ("cola", {"sentence": float("nan"), "label": 1}, "'sentence' .* empty"),
        ("cola", {"sentence": ["a"], "label": 1}, "'sentence' has a list"),
        ("cola", {"sentence": "A", "label": None}, "label ''"),
        ("stsb", {"sentence1": "A", "sentence2": "B", "label": 5.5}, "5.5 .* outside its range, 0 to 5"),
        ("stsb", {"sentence1": "A", "sentence2": "B", "label": float("nan")}, "not a number"),
        ("cola", {"sentense": "A", "label": 1}, "no column 'sentence'; did you mean 'sentense'"),
    ],
)
def test_unusable_rows_are_named(name, row, message):
    with pytest.raises(UserError, match=f"^FILE: row 7: .*{message}"):
        get_task(name).example(row, id="0", where="FILE: row 7")


def test_blank_questions_of_qqp_and_blank_documents_stay():
    assert get_task("qqp").example({"question1": "A?", "question2": None, "label": 0}, "0", "").source.endswith(": ")
    assert get_task("xsum").example({"document": "", "summary": "S"}, "0", "").source == "summarize: "


def test_mixtures_expand_in_order_and_once():
    glue = ["cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "qnli", "rte"]
    assert [task.name for task in expand_tasks(["glue"])] == glue
    both = [task.name for task in expand_tasks(["glue", "summ_nli", "rte"])]
    assert both == [*glue, "xsum", "cnn_dailymail", "wiki_lingua", "art", "anli"]
    names = [task.name for task in expand_tasks(["all"])]
    assert len(names) == len(set(names)) and set(both) <= set(names)
    assert [task.name for task in expand_tasks("rte")] == ["rte"]


def test_every_mixture_is_of_known_tasks():
    tasks, mixtures = registry()
    assert {member for members in mixtures.values() for member in members} <= set(tasks)


def test_faulty_names_name_the_nearest():
    with pytest.raises(UserError, match="unknown task 'qnly'; did you mean 'qnli'"):
        get_task("qnly")
    with pytest.raises(UserError, match="unknown task 'gleu'; did you mean 'glue'"):
        expand_tasks(["rte", "gleu"])
    with pytest.raises(UserError, match="data.tasks is empty"):
        expand_tasks([])


def test_decoding_of_summaries():
    beams = {name: get_task(name).decoding.num_beams for name in ("xsum", "cnn_dailymail", "wiki_lingua")}
    assert beams == {"xsum": 6, "cnn_dailymail": 4, "wiki_lingua": 4}
    assert get_task("xsum").decoding.max_target_length == 60
    assert get_task("rte").decoding.num_beams is None
