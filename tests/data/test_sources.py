"""Parquet in a mirror of the hub's layout: what is found, what is missing, and real text."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hdscale.data import hub
from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, load_examples, split_size
from hdscale.data.tasks import expand_tasks, get_task
from hdscale.errors import UserError
from tests.helpers.places import HUB, needs_real_text

NLI = {"premise": "P", "hypothesis": "H", "label": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HDSCALE_CACHE", str(tmp_path / "cache"))


def write(root, name, rows):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("names", "configs", "origin", "found"),
    [
        (["rte/train-00000-of-00001.parquet", "cola/train-00000-of-00001.parquet"], ("rte",), "train", [0]),
        (
            ["3.0.0/train-00001-of-00002.parquet", "3.0.0/train-00000-of-00002.parquet"],
            ("3.0.0",),
            "train",
            [1, 0],
        ),
        (["data/train-00000-of-00001-9c41e176666ea82f.parquet"], ("default", "data", ""), "train", [0]),
        (["train-00000-of-00001.parquet"], ("default", "data", ""), "train", [0]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], ("default",), "train", [0, 1]),
        (["en/wiki_lingua-test.parquet", "en/wiki_lingua-sampled_test.parquet"], ("en",), "test", [0]),
        (
            ["plain_text/anli-dev_r1.parquet", "plain_text/anli-dev_r2.parquet"],
            ("plain_text",),
            "dev_r2",
            [1],
        ),
        (["mnli/validation_matched-00000-of-00001.parquet"], ("mnli",), "validation", []),
        (["other/train-00000-of-00001.parquet"], ("rte",), "train", []),
    ],
)
def test_the_hubs_layouts(names, configs, origin, found):
    assert hub.match(names, configs, origin) == [names[index] for index in found]


def test_shards_and_rounds_are_joined_in_order(tmp_path):
    for number, rows in ((0, 2), (1, 3)):
        write(
            tmp_path,
            f"facebook/anli/train_r1-0000{number}-of-00002.parquet",
            [{**NLI, "label": number}] * rows,
        )
    write(tmp_path, "facebook/anli/train_r2-00000-of-00001.parquet", [{**NLI, "label": 2}])
    write(tmp_path, "facebook/anli/train_r3-00000-of-00001.parquet", [{**NLI, "label": 0}])
    settings = DataSettings(root=str(tmp_path))
    rows = load_examples(get_task("anli"), "train", settings)
    assert [row.target for row in rows] == ["0", "0", "1", "1", "1", "2", "0"]
    assert [row.id for row in rows][-3:] == ["train_r1-4", "train_r2-0", "train_r3-0"]
    assert split_size(get_task("anli"), "train", settings) == 7
    (tmp_path / "facebook/anli/train_r1-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="train_r1-00001-of-00002.parquet: shard 00000-of-00002 is missing"):
        check_splits([get_task("anli")], settings)


def test_what_a_mirror_lacks_is_named(tmp_path):
    settings = DataSettings(root=str(tmp_path))
    with pytest.raises(UserError, match=r"glue/rte/train-00000-of-00001.parquet is missing.*hdscale prepare"):
        check_splits([get_task("rte")], settings)
    path = write(
        tmp_path,
        "nyu-mll/glue/rte/train-00000-of-00001.parquet",
        [{"sentence1": "A", "sentense2": "B", "label": 1}],
    )
    with pytest.raises(UserError, match=f"{path}: no column 'sentence2'.*did you mean 'sentense2'"):
        check_splits([get_task("rte")], settings)
    write(
        tmp_path,
        "nyu-mll/glue/rte/train-00000-of-00001.parquet",
        [{"sentence1": "A", "sentence2": "B", "label": 1}],
    )
    with pytest.raises(UserError, match="rte/validation-00000-of-00001.parquet is missing.*there: rte/train-"):
        check_splits([get_task("rte")], settings)
    with pytest.raises(UserError, match="data.root=.*not a folder"):
        check_splits([get_task("rte")], DataSettings(root=str(tmp_path / "nowhere")))


def test_faulty_rows_of_a_mirror_are_named(tmp_path):
    row = {"sentence1": "A", "sentence2": "B", "label": 1}
    name = "nyu-mll/glue/rte/train-00000-of-00001.parquet"
    settings = DataSettings(root=str(tmp_path))
    path = write(tmp_path, name, [row, row, {**row, "label": -1}])
    with pytest.raises(UserError, match=f"{path}: row 2: label '-1' is not a label of"):
        load_examples(get_task("rte"), "train", settings)
    write(tmp_path, name, [row, {**row, "sentence2": ""}])
    with pytest.raises(UserError, match=f"{path}: row 1: column 'sentence2' .* empty"):
        load_examples(get_task("rte"), "train", settings)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{path}: not a readable parquet"):
        check_splits([get_task("rte")], settings)


@needs_real_text
def test_real_text_has_the_sizes_of_table_10_where_whole():
    settings = DataSettings(root=str(HUB))
    for task in expand_tasks(["cola", "sst2", "stsb", "mrpc", "rte"]):
        assert {split: split_size(task, split, settings) for split in task.splits} == dict(task.sizes)


@needs_real_text
def test_real_text_of_every_task():
    settings = DataSettings(root=str(HUB))
    tasks = [task for task in expand_tasks(["glue", "summ_nli"], settings) if task.name != "cnn_dailymail"]
    check_splits(tasks, settings)
    for task in tasks:
        splits = {split: load_examples(task, split, settings) for split in ("validation", "test")}
        for split, rows in splits.items():
            assert len(rows) == split_size(task, split, settings) > 1
            assert len({row.id for row in rows}) == len(rows)
            if task.kind == "label":
                assert {row.target for row in rows} <= set(task.labels)
        shared = {row.id for row in splits["validation"]} & {row.id for row in splits["test"]}
        own = task.splits["validation"].origins == task.splits["test"].origins
        assert not shared if own else True


@needs_real_text
def test_hidden_labels_of_a_real_test_set_are_refused():
    task = get_task("rte")
    hidden = replace(task, splits={"test": replace(task.splits["train"], origins=("test",))})
    with pytest.raises(UserError, match=r"rte/test-00000-of-00001.parquet: row 0: label '-1'.*hidden"):
        load_examples(hidden, "test", DataSettings(root=str(HUB)))


@needs_real_text
def test_a_copied_mirror_reads_the_same(tmp_path):
    shutil.copytree(HUB / "nyu-mll" / "glue" / "rte", tmp_path / "nyu-mll" / "glue" / "rte")
    here, there = (
        load_examples(get_task("rte"), "validation", DataSettings(root=str(root))) for root in (HUB, tmp_path)
    )
    assert here == there
