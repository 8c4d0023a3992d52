"""Reading the MRQA shared task's files and the hub's form, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, load_examples, split_size
from hdscale.data.tasks import expand_tasks, get_task
from hdscale.data.tasks.mrqa import question as mrqa_question
from hdscale.data.tasks.mrqa import reader as mrqa
from hdscale.data.tasks.mrqa import tasks as mrqa_tasks
from hdscale.data.tokenize import tokenized_split
from hdscale.errors import UserError
from tests.helpers.evaluation_jobs import word_tokenizer
from tests.helpers.places import DATA

HEADER = {"header": {"dataset": "SQuAD", "split": "dev"}}
CONTEXT = "cat sat on mat . red dog ran far"


def qa(qid: str = "q0", question: str = "who sat ?", answer: str = "cat", context: str = CONTEXT, **changes):
    first = context.index(answer)
    detected = [{"text": answer, "char_spans": [[first, first + len(answer) - 1]], "token_spans": [[0, 0]]}]
    return {"qid": qid, "question": question, "answers": [answer], "detected_answers": detected} | changes


def passage(*qas, context: str = CONTEXT):
    return {"id": "", "context": context, "qas": list(qas)}


def write(folder: Path, lines: list, name: str = "SQuAD.jsonl.gz", place: str = "dev") -> Path:
    path = folder / place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def squad(folder: Path, **changes):
    settings = (
        DataSettings(mrqa_root=str(folder), cache=str(folder / "cache"), max_source_length=64)
        if "root" not in changes
        else None
    )
    settings = settings or DataSettings(cache=str(folder / "cache"), max_source_length=64, **changes)
    return next(task for task in mrqa_tasks.tasks(settings) if task.name == "squad"), settings


def read(folder: Path) -> list[mrqa_question.Question]:
    task, settings = squad(folder)
    return list(mrqa.questions(task, "validation", settings))


@pytest.mark.parametrize("name", ["SQuAD.jsonl.gz", "SQuAD.jsonl"])
@pytest.mark.parametrize("header", [True, False])
def test_files_with_and_without_header_or_compression(tmp_path, name, header):
    write(tmp_path, [HEADER] * header + [passage(qa(), qa("q1", answer="red dog"))], name)
    one, two = read(tmp_path)
    assert (one.source, one.target, one.references) == (
        f"question: who sat ? context: {CONTEXT}",
        "cat",
        ("cat",),
    )
    assert (two.id, two.spans, two.target) == ("q1", ((17, 23),), "red dog")


def test_twelve_sets_as_the_paper_lists_them():
    tasks = expand_tasks(["mrqa"])
    assert [task.name for task in tasks if task.trains] == list(mrqa_tasks.IN_DOMAIN)
    assert len(tasks) == 12 and {task.name for task in tasks} - set(mrqa_tasks.IN_DOMAIN) == set(
        mrqa_tasks.OUT_OF_DOMAIN
    )
    assert all(task.metrics == ("em", "f1") and task.sizes["validation"] for task in tasks)
    assert get_task("naturalquestions").options["set"] == "NaturalQuestionsShort"
    assert [task.name for task in expand_tasks(["mrqa_out_of_domain"])] == list(mrqa_tasks.OUT_OF_DOMAIN)


def test_training_reads_the_train_folder_and_evaluation_the_dev_folder(tmp_path):
    write(tmp_path, [passage(qa("t"))], place="train")
    write(tmp_path, [passage(qa("d"))])
    task, settings = squad(tmp_path)
    ids = {
        split: [question.id for question in mrqa.questions(task, split, settings)]
        for split in ("train", "validation", "test")
    }
    assert ids == {"train": ["t"], "validation": ["d"], "test": ["d"]}
    assert split_size(task, "train", settings) == 1


def test_files_under_the_data_root(tmp_path):
    write(tmp_path / "mrqa", [passage(qa())])
    task, settings = squad(tmp_path, root=str(tmp_path))
    assert [question.id for question in mrqa.questions(task, "validation", settings)] == ["q0"]


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, [passage(qa())], "NewsQA.jsonl.gz")
    task, settings = squad(tmp_path)
    with pytest.raises(UserError, match=r"dev/SQuAD.jsonl.gz is missing: split 'validation' of task squad"):
        check_splits([task], settings, ["validation"])


def hub_row(form: str, subset: str = "SQuAD"):
    record = qa()
    spans = {"start": [0], "end": [2]} if form == "lists" else [{"start": 0, "end": 2}]
    detected = {"text": ["cat"], "char_spans": [spans]} if form == "lists" else [{"text": "cat", "char_spans": spans}]
    return {
        "subset": subset,
        "context": CONTEXT,
        "qid": "q0",
        "question": record["question"],
        "answers": ["cat"],
        "detected_answers": detected,
    }


@pytest.mark.parametrize("form", ["lists", "records"])
def test_the_hubs_form_reads_the_same(tmp_path, form):
    write(tmp_path / "files", [HEADER, passage(qa())])
    folder = tmp_path / "mirror" / "mrqa-workshop" / "mrqa" / "plain_text"
    folder.mkdir(parents=True)
    rows = [hub_row(form, "NewsQA"), hub_row(form)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    task, settings = squad(tmp_path, root=str(tmp_path / "mirror"))
    check_splits([task], settings, ["validation"])
    (from_hub,) = mrqa.questions(task, "validation", settings)
    (from_file,) = read(tmp_path / "files")
    assert from_hub == from_file


def test_a_hub_file_without_a_column(tmp_path):
    folder = tmp_path / "mrqa-workshop" / "mrqa"
    folder.mkdir(parents=True)
    row = hub_row("lists")
    del row["answers"]
    pq.write_table(pa.Table.from_pylist([row]), folder / "validation-00000-of-00001.parquet")
    task, settings = squad(tmp_path, root=str(tmp_path))
    with pytest.raises(UserError, match="validation-00000-of-00001.parquet: no column 'answers'"):
        check_splits([task], settings, ["validation"])


BAD = {
    "no context": ([HEADER, {"qas": []}], r"line 2: field 'context' is missing"),
    "no qas": ([{"context": "x"}], r"line 1: field 'qas' is missing"),
    "header without set": ([{"header": {"split": "dev"}}], r"line 1: field 'header.dataset' is missing"),
    "no qid": (
        [HEADER, passage(qa(), {"question": "x", "answers": []})],
        r"line 2: qas\[1\]: field 'qid' is missing",
    ),
    "question no text": ([passage(qa(question=3))], r"qas\[0\]: field 'question' must be a str, not int"),
    "no answers": ([passage({"qid": "q", "question": "x"})], r"qas\[0\]: field 'answers' is missing"),
    "span past the end": (
        [passage(qa(detected_answers=[{"text": "x", "char_spans": [[0, 2], [30, 33]]}]))],
        r"line 1: qas\[0\]: field 'detected_answers\[0\].char_spans\[1\]' is \[30, 33\], "
        r"outside the context of 32 characters",
    ),
    "span backwards": (
        [passage(qa(detected_answers=[{"text": "x", "char_spans": [[5, 4]]}]))],
        r"is \[5, 4\], outside",
    ),
    "negative span": (
        [passage(qa(detected_answers=[{"text": "x", "char_spans": [[-3, -1]]}]))],
        r"is \[-3, -1\], outside",
    ),
    "span no pair": (
        [passage(qa(detected_answers=[{"text": "x", "char_spans": [[1]]}]))],
        r"must be \[first, last\], not \[1\]",
    ),
    "span of floats": (
        [passage(qa(detected_answers=[{"text": "x", "char_spans": [[1.0, 2]]}]))],
        r"must be \[first, last\]",
    ),
    "no spans": (
        [passage(qa(detected_answers=[{"text": "x"}]))],
        r"'detected_answers\[0\].char_spans' is missing",
    ),
    "qas no records": ([passage("x")], r"qas\[0\] must be an object"),
    "a list": ([[1]], r"line 1 is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_name_file_line_and_field(tmp_path, case):
    lines, message = BAD[case]
    path = write(tmp_path, lines)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_name_the_line(tmp_path):
    path = write(
        tmp_path,
        [HEADER] + [passage(qa(f"q{n}", question=f"who {os.urandom(40).hex()} ?")) for n in range(400)],
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"SQuAD.jsonl.gz: damaged or cut off after line \d\d+"):
        read(tmp_path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 60]) + whole[middle + 60 :])
    with pytest.raises(UserError, match=r"SQuAD.jsonl.gz: (damaged|line|not UTF-8)"):
        read(tmp_path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match="damaged or cut off after line 0"):
        read(tmp_path)
    path.write_bytes(gzip.compress(b'{"header": {"dataset": "x"}}\n{"context": \n'))
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read(tmp_path)


def test_repeated_ids(tmp_path):
    """The same question again is left out; another under the same qid is kept, and the official form has the
    last.
    """
    other = "who ran far ?"
    write(tmp_path, [passage(qa(), qa()), passage(qa(question=other, answer="dog"), qa("q1"))])
    questions = read(tmp_path)
    assert [(question.id, question.qid, question.question) for question in questions] == [
        ("q0", "q0", "who sat ?"), ("q0~2", "q0", other), ("q1", "q1", "who sat ?")
    ]  # fmt: skip
    assert mrqa_question.official_ids(["q0", "q0~2", "lonely~2"]) == {"q0": "q0", "q0~2": "q0", "lonely~2": "lonely~2"}


def test_questions_without_an_answer_or_a_context_are_kept(tmp_path):
    unanswered = qa("q1", detected_answers=[], answers=["mat"])
    nowhere = {"qid": "q2", "question": "who ?", "answers": [], "detected_answers": []}
    write(tmp_path, [passage(unanswered), passage(nowhere, context="")])
    one, two = read(tmp_path)
    assert (one.target, one.references, one.spans) == ("", ("mat",), ())
    assert (two.target, two.references, two.context) == ("", ("",), "")


def test_gold_answers_default_to_the_detected_ones(tmp_path):
    record = qa()
    del record["answers"]
    write(tmp_path, [passage(record)])
    assert read(tmp_path)[0].references == ("cat",)


def test_unicode_offsets_and_surrogates(tmp_path):
    context = "😀 é \ud800 naïve cat"
    record = qa(context=context)
    write(tmp_path, [passage(record, context=context)])
    (question,) = read(tmp_path)
    assert question.target == "cat"
    assert question.context == "😀 é \ufffd naïve cat"
    question.source.encode()


def test_white_space_at_the_ends_of_a_span_is_left_off(tmp_path):
    record = qa(detected_answers=[{"text": " sat ", "char_spans": [[3, 7], [3, 3]]}])
    write(tmp_path, [passage(record)])
    assert read(tmp_path)[0].spans == ((4, 6),)


def test_a_template_that_does_not_end_with_the_context():
    with pytest.raises(UserError, match="at its end, '{context}'"):
        mrqa_question.prompt_before_context("{context} {question}", "who")


def test_tokenised_chunks_are_the_windows_themselves(tmp_path):
    """The cache has the windows' own ids, row for row with the examples; a changed overlap is another
    entry.
    """
    long = "cat sat on mat . red dog ran far " * 20
    write(tmp_path, [passage(qa(context=long), context=long), passage(qa("q1"))])
    task, settings = squad(tmp_path)
    settings.chunk_overlap = 24
    tokenizer = word_tokenizer()
    examples = load_examples(task, "validation", settings, tokenizer)
    rows = tokenized_split(task, "validation", tokenizer, settings)
    assert len(rows) == len(examples) > 3
    for number, example in enumerate(examples):
        row = rows.row(number)
        assert (row.input_ids, row.id) == (list(example.input_ids), example.id)
        assert row.labels == tokenizer(example.target).input_ids
    settings.chunk_overlap = 0
    assert len(tokenized_split(task, "validation", tokenizer, settings)) < len(rows)
    assert [example.group for example in load_examples(task, "validation", settings)] == [None, None], (
        "no tokenizer: whole questions"
    )


@pytest.mark.skipif(not (DATA / "mrqa").is_dir(), reason="no MRQA files: set HDSCALE_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "split", "questions"),
    [("squad", "test", 2461), ("naturalquestions", "validation", 500), ("relationextraction", "test", 127)],
)
def test_real_files(name, split, questions):
    settings = DataSettings(mrqa_root=str(DATA / "mrqa"), max_source_length=512)
    task = next(task for task in mrqa_tasks.tasks(settings) if task.name == name)
    found = list(mrqa.questions(task, split, settings))
    assert len(found) == questions
    assert all(question.target and question.target in question.context for question in found)
