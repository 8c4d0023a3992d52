"""Tasks that users declare: the documented examples, and every mistake in a declaration or its files."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hdscale.config import load_config
from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, load_examples, split_size
from hdscale.data.tasks import SPLITS, expand_tasks, get_task
from hdscale.errors import UserError
from hdscale.settings import flatten
from tests.helpers.places import ROOT

EXAMPLES = ROOT / "configs" / "examples"
LABEL = {
    "name": "mine",
    "kind": "label",
    "source": "say: {text}",
    "target": "{label}",
    "labels": ["no", "yes"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HDSCALE_CACHE", str(tmp_path / "cache"))


def label_task(files, **changes):
    return get_task({**LABEL, "files": {"train": files}, **changes})


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("file", "sizes", "source", "target"),
    [
        ("classification", (32, 8, 8), "review: The market was mean and dirty.", "negative"),
        (
            "regression",
            (32, 8, 8),
            "similarity first: A woman waters the plants at home. second: A woman, at home",
            "5.0",
        ),
        ("generation", (24, 6, 6), "headline: The town council said", "Harbour turns a hundred on Sunday"),
        ("qa", (24, 6, 6), "question: Where is the lamp? context: Emma put", "the second drawer"),
    ],
)
def test_documented_examples(file, sizes, source, target, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_config(EXAMPLES / f"{file}.yaml").data
    (task,) = expand_tasks(settings.tasks, settings)
    check_splits([task], settings)
    splits = {split: load_examples(task, split, settings) for split in SPLITS}
    assert tuple(len(rows) for rows in splits.values()) == sizes
    assert tuple(split_size(task, split, settings) for split in SPLITS) == sizes
    first = splits["train"][0] if file != "regression" else next(r for r in splits["train"] if r.target == "5.0")
    assert first.source.startswith(source) and first.target == target
    ids = [row.id for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_the_yaml_in_the_documentation_is_the_examples():
    blocks = (ROOT / "docs" / "tasks.md").read_text().split("```yaml\n")[1:]
    documented = yaml.safe_load(blocks[1].split("```")[0])["reviews"]
    shipped = load_config(EXAMPLES / "classification.yaml").data.custom["reviews"]
    assert documented == shipped
    assert get_task({**documented, "name": "reviews"}).labels == ("negative", "positive")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "labels"}, "unknown kind 'labels'; did you mean 'label'"),
        ({"kind": None}, "'kind' is missing"),
        ({"source": None}, "'source' is missing"),
        ({"source": "no column"}, "names no column"),
        ({"source": "{text"}, "expected '}'"),
        ({"source": "{text!r}"}, "only plain column names"),
        ({"target": None}, "'target' is missing"),
        ({"sorce": "x"}, "unknown key 'sorce'; did you mean 'source'"),
        ({"labels": None}, "needs 'labels'"),
        ({"labels": ["a", "a"]}, "names one twice"),
        ({"labels": {}}, "needs 'labels'"),
        ({"kind": "text"}, "'labels' is for tasks of kind label"),
        ({"files": None}, "either 'files"),
        ({"files": {"train": "a.xlsx"}}, "a.xlsx: unknown file type"),
        ({"files": {"training": "a.csv"}}, "'training'.*did you mean 'train'"),
        ({"files": "a.csv"}, "'files' must map"),
        ({"files": {"train": []}}, "names no file for train"),
        ({"repo": "a/b"}, "either 'files"),
        ({"splits": {"dev": "train"}}, "unknown split 'dev'"),
        ({"splits": {"train": "trian"}}, "'trian', which 'files' lacks; did you mean 'train'"),
        ({"splits": {"train": {"part": "half"}}}, "unknown part 'half'"),
        ({"splits": {"train": {"row": 3}}}, "unknown key 'row'"),
        ({"splits": {"train": {"rows": 0}}}, "rows must be a positive"),
        ({"decoding": {"beams": 2}}, "unknown key 'beams'; did you mean 'num_beams'"),
        ({"decoding": {"num_beams": 0}}, "num_beams must be"),
        ({"decoding": 3}, "'decoding' must be a mapping"),
        ({"step": -1}, "'step'"),
        ({"bounds": [1]}, "'bounds'"),
        ({"metrics": {"a": 1}}, "'metrics' must be a text or a list"),
        ({"name": "a/b"}, "name must be a word"),
    ],
)
def test_faulty_declarations(change, message):
    declaration = {**LABEL, "files": {"train": "a.csv"}, **change}
    with pytest.raises(UserError, match=message):
        get_task({key: value for key, value in declaration.items() if value is not None})


def test_custom_names_and_mixtures():
    declared = {key: value for key, value in LABEL.items() if key != "name"} | {"files": {"train": "a.csv"}}
    settings = DataSettings(custom={"mine": declared}, mixtures={"both": ["mine", "rte"]})
    assert [task.name for task in expand_tasks(["both"], settings)] == ["mine", "rte"]
    assert expand_tasks([{**declared, "name": "other"}, "rte"], settings)[0].name == "other"
    for faulty, message in [
        (DataSettings(custom={"rte": declared}), "task or mixture of this name"),
        (DataSettings(custom={"mine": 3}), "must be a mapping"),
        (DataSettings(mixtures={"glue": ["rte"]}), "task or mixture of this name"),
        (DataSettings(mixtures={"m": []}), "must be a list"),
        (DataSettings(mixtures={"m": ["m"]}), "contains itself"),
        (DataSettings(mixtures={"m": ["rta"]}), "data.mixtures.m: unknown task 'rta'"),
    ]:
        with pytest.raises(UserError, match=message):
            expand_tasks(["m"] if "m" in faulty.mixtures else ["rte"], faulty)
    with pytest.raises(UserError, match="two different tasks are called 'mine'"):
        expand_tasks(["mine", {**declared, "name": "mine", "target": "{answer}"}], settings)
    with pytest.raises(UserError, match="neither a name nor a mapping"):
        expand_tasks([3], settings)


def test_every_file_type_gives_the_same_rows(tmp_path):
    rows = [{"text": "plain", "label": "no"}, {"text": 'quoted "word", and\ttab é', "label": "yes"}]
    files = {
        "jsonl": write_lines(tmp_path / "a.jsonl", rows),
        "gzip": write_lines(tmp_path / "b.jsonl.gz", rows),
        "csv": str(tmp_path / "c.csv"),
        "parquet": str(tmp_path / "e.parquet"),
    }
    Path(files["csv"]).write_bytes(
        b'\xef\xbb\xbftext,label\r\nplain,no\r\n"quoted ""word"", and\ttab \xc3\xa9",yes\r\n'
    )
    pq.write_table(pa.Table.from_pylist(rows), files["parquet"])
    wanted = [("say: " + row["text"], row["label"], f"train-{number}") for number, row in enumerate(rows)]
    for path in files.values():
        found = load_examples(label_task(path), "train", DataSettings())
        assert [(row.source, row.target, row.id) for row in found] == wanted


def test_tsv_has_no_quoting_and_may_lack_a_header(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text('\ufeffgj04\tyes\t\t"Unbalanced quote.\n\ngj04\tno\t*\tSecond.\n', encoding="utf-8")
    task = label_task(str(path), header=["source", "label", "mark", "text"])
    found = load_examples(task, "train", DataSettings())
    assert [(row.source, row.target) for row in found] == [
        ('say: "Unbalanced quote.', "yes"),
        ("say: Second.", "no"),
    ]


def test_several_files_join_in_order(tmp_path):
    paths = [write_lines(tmp_path / f"{n}.jsonl", [{"text": f"row {n}", "label": "no"}] * (n + 1)) for n in range(2)]
    found = load_examples(label_task(paths), "train", DataSettings())
    assert [(row.id, row.source) for row in found] == [
        ("train-0", "say: row 0"),
        ("train-1", "say: row 1"),
        ("train-2", "say: row 1"),
    ]


def test_lists_of_gold_answers(tmp_path):
    (tmp_path / "a.csv").write_text('q,a\nwho?,"[""Ada"", ""Ada L.""]"\nwhen?,1843\n')
    (tmp_path / "b.jsonl").write_text(
        '{"q": "who?", "a": {"text": ["Ada", "Ada L."]}}\n{"q": "when?", "a": {"text": []}}\n'
    )
    declared = {"name": "quiz", "kind": "qa", "source": "{q}"}
    csv_task = get_task({**declared, "references": "a", "files": {"train": str(tmp_path / "a.csv")}})
    found = load_examples(csv_task, "train", DataSettings())
    assert [(row.target, row.references) for row in found] == [
        ("Ada", ("Ada", "Ada L.")),
        ("1843", ("1843",)),
    ]
    nested = get_task({**declared, "references": "a.text", "files": {"train": str(tmp_path / "b.jsonl")}})
    found = load_examples(nested, "train", DataSettings())
    assert [(row.target, row.references) for row in found] == [("Ada", ("Ada", "Ada L.")), ("", ())]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x", "label": "no"}\n{"text": "y", "lable": "no"}\n',
            "line 2: no column 'label'.*'lable'",
        ),
        (
            "a.jsonl",
            b'{"txt": "x", "label": "no"}\n',
            "no column 'text', which task mine reads; did you mean 'txt'",
        ),
        ("a.jsonl", b'{"text": "x", "label": "no"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "x", "label": "no"}\n\xff\xfe\n', "not UTF-8"),
        ("a.jsonl", b'{"text": "x", "label": "maybe"}\n', "line 1: label 'maybe' .*no, yes"),
        ("a.jsonl", b'{"text": " ", "label": "no"}\n', "line 1: column 'text' .* empty"),
        ("a.jsonl", b'{"text": "\\ud83d", "label": "no"}\n', "line 1: .*ud83d is half a character"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x", "label": "no"}\n' * 99)[:-12], "damaged or cut off"),
        ("a.jsonl.gz", b"no gzip", "damaged or cut off after line 0"),
        ("a.csv", b"text,label\nx,no\ny\n", "line 3 has 1 cells"),
        ("a.csv", b"text,mark\nx,no\n", "no column 'label'"),
        ("a.csv", b'text,label\n"x"y,no\n', "line 2: .*quoting"),
        ("a.csv", b"", "no column 'text'"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet"),
    ],
)
def test_faulty_files_are_named_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}") as caught:
        load_examples(label_task(str(path)), "train", DataSettings())
    assert "\n" not in str(caught.value)


def test_missing_files_and_repeated_ids(tmp_path):
    with pytest.raises(UserError, match="no file .*nowhere.csv"):
        check_splits([label_task(str(tmp_path / "nowhere.csv"))], DataSettings())
    rows = [{"text": "x", "label": "no", "key": key} for key in ("a", "b", "a")]
    task = label_task(write_lines(tmp_path / "a.jsonl", rows), id="key")
    with pytest.raises(UserError, match="line 3: id 'a' .* line 1 too"):
        load_examples(task, "train", DataSettings())
    with pytest.raises(UserError, match="has no test split; it has: train"):
        load_examples(task, "test", DataSettings())


def test_a_declaration_survives_a_resolved_configuration(tmp_path):
    config = load_config(EXAMPLES / "classification.yaml", ["data.custom.reviews.metrics=[accuracy]"])
    flat = flatten(asdict(config))
    assert flat["data.custom.reviews.labels.0"] == "negative"
    assert flat["data.custom.reviews.metrics"] == ["accuracy"]
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(asdict(config)))
    assert load_config(tmp_path / "resolved.yaml") == config
    (tmp_path / "inline.yaml").write_text(
        yaml.safe_dump({"data": {"tasks": ["rte", {**LABEL, "files": {"train": "a.csv"}}]}})
    )
    inline = load_config(tmp_path / "inline.yaml").data
    assert [task.name for task in expand_tasks(inline.tasks, inline)] == ["rte", "mine"]
