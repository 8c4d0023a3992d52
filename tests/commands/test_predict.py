"""`hdscale predict`: order, tasks, bad rows, bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hdscale.commands.cli import main
from hdscale.config import Config
from hdscale.errors import UserError
from hdscale.evaluation.evaluator import Evaluator
from hdscale.evaluation.generation import Decoder, Decoding
from hdscale.evaluation.predictor import Predictor
from hdscale.evaluation.requests import BadRow, Request, parse, read_requests
from hdscale.load import Choice, Loaded

TEXTS = [
    "the cat sat on the mat",
    "a",
    "who was far away in the red house",
    "blue",
    "dog " * 30,
    "one two three",
]


def predict_file(run_folder: Path, folder: Path, rows: list, *options: str, code: int = 0) -> list[dict]:
    source = folder / "in.jsonl"
    source.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    target = folder / "out.jsonl"
    arguments = [
        "predict",
        "--run",
        str(run_folder),
        "--input",
        str(source),
        "--output",
        str(target),
        "--quiet",
        "--overwrite",
        *options,
    ]
    assert main(arguments) == code
    return [json.loads(line) for line in target.read_text().splitlines()] if code == 0 else []


def test_free_text_stays_in_order_with_any_window(run_folder, tmp_path, capsys):
    rows = [{"source": text, "id": f"row-{number}"} for number, text in enumerate(TEXTS * 3)]
    whole = predict_file(run_folder, tmp_path, rows)
    assert [row["id"] for row in whole] == [f"row-{number}" for number in range(18)]
    assert [row["line"] for row in whole] == list(range(1, 19))
    assert predict_file(run_folder, tmp_path, rows, "--window", "4", "--batch-size", "3") == whole
    assert len({row["prediction"] for row in whole}) > 2
    assert "18 rows predicted, 0 skipped" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_predictions_are_the_models_own(run_folder, tmp_path):
    """Against a direct call of the model, row by row; the base is the random one of the run's seed."""
    loaded = Choice(run=str(run_folder)).load(Choice(run=str(run_folder)).config())
    found = predict_file(run_folder, tmp_path, [{"source": text} for text in TEXTS], "--scores")
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([loaded.tokenizer(text, truncation=True, max_length=48).input_ids])
        generated = loaded.model.generate(
            ids, torch.ones_like(ids), task_ids=torch.tensor([-1]), max_new_tokens=6, do_sample=False
        )
        assert row["prediction"] == loaded.tokenizer.decode(generated[0], skip_special_tokens=True)
        labels = generated[:, 1:]
        likelihood = loaded.model.log_likelihood(ids, torch.ones_like(ids), labels, task_ids=torch.tensor([-1]))
        assert row["score"] == pytest.approx(likelihood.item(), abs=1e-3)


def test_rows_of_several_tasks(run_folder, tmp_path):
    rows = [
        {"task": "pairs", "one": "cat", "two": "dog"},
        {"source": "free"},
        {"task": "pairs", "one": "x", "two": ""},
        {"task": "squad", "question": "who sat ?", "context": ""},
        {"text": "free too"},
    ]
    found = predict_file(run_folder, tmp_path, rows)
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5]
    direct = predict_file(run_folder, tmp_path, [{"one": "cat", "two": "dog"}], "--task", "pairs")
    assert direct[0]["prediction"] == found[0]["prediction"]


def test_questions_are_answered_as_in_evaluation(run_folder, tmp_path):
    """The same questions through `predict` and through the evaluator: chunks, scores and the choice among them."""
    choice = Choice(run=str(run_folder))
    config = choice.config()
    loaded = choice.load(config)
    from hdscale.data.tasks import get_task
    from hdscale.data.tasks.mrqa.reader import questions

    squad = get_task("squad", config.data)
    asked = list(questions(squad, "test", config.data))
    evaluator = Evaluator(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        task_ids={"pairs": 0, "squad": 1},
        settings=config.eval,
        data=config.data,
        folder=tmp_path / "e",
    )
    evaluator.evaluate_split(squad, "test", step=1)
    expected = json.loads((tmp_path / "e" / "squad.test.official.json").read_text())
    rows = [{"qid": one.qid, "question": one.question, "context": one.context} for one in asked]
    found = predict_file(run_folder, tmp_path, rows, "--task", "squad")
    assert {row["id"]: row["prediction"] for row in found} == expected
    assert len(found) == 11


BAD = {
    "not JSON": (b"{oops", "line 2: not JSON"),
    "no object": (b"[1]", "line 2: must be a JSON object, not list"),
    "no text": (b'{"sourc": "x"}', "line 2: no field 'source'; did you mean 'sourc'?"),
    "empty": (b'{"source": "  "}', "line 2: field 'source' is empty or not a text"),
    "number": (b'{"source": 3}', "line 2: field 'source' is empty or not a text"),
    "bytes": (b'{"source": "\xff"}', "line 2: not UTF-8"),
    "unknown task": (b'{"task": "pears"}', "line 2: data: unknown task 'pears'; did you mean 'pairs'?"),
    "task no name": (b'{"task": 3}', "line 2: field 'task' must be a name"),
    "no column": (b'{"task": "pairs", "one": "x"}', "line 2: no column 'two'"),
    "empty column": (
        b'{"task": "pairs", "one": "", "two": "x"}',
        "line 2: column 'one' of task pairs is empty",
    ),
    "column a list": (b'{"task": "pairs", "one": [1], "two": "x"}', "line 2: column 'one' has a list"),
    "no context": (b'{"task": "squad", "question": "x"}', "line 2: field 'context' of task squad is missing"),
}


@pytest.fixture(scope="module")
def find_task(run_folder):
    from hdscale.data.tasks import get_task

    config = Choice(run=str(run_folder)).config()
    return lambda name: get_task(name, config.data)


@pytest.mark.parametrize("case", BAD)
def test_messages_about_bad_rows_name_line_and_field(find_task, case):
    raw, message = BAD[case]
    with pytest.raises(BadRow) as caught:
        parse(2, raw, None, find_task)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_bad_rows_stop_or_are_skipped(run_folder, tmp_path, capsys):
    rows = [{"source": "cat"}, *(raw for raw, _ in BAD.values()), b"", {"source": "dog"}]
    found = predict_file(run_folder, tmp_path, rows, "--on-error", "skip")
    assert [row["line"] for row in found] == [1, len(BAD) + 3]
    said = capsys.readouterr().err
    assert said.count("skipped line") == len(BAD) and f"2 rows predicted, {len(BAD)} skipped" in said
    (tmp_path / "out.jsonl").write_text("kept\n")
    predict_file(run_folder, tmp_path, rows, code=2)
    assert "hdscale: error: line 2: not JSON" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "kept\n"


def test_a_bad_row_after_the_first_window_keeps_earlier_predictions(run_folder, tmp_path, capsys):
    rows = [{"source": text} for text in TEXTS] + [b"{"]
    predict_file(run_folder, tmp_path, rows, "--window", "3", code=2)
    assert "line 7: not JSON" in (said := capsys.readouterr().err) and "out.jsonl.partial" in said
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 6
    assert not (tmp_path / "out.jsonl").exists()


def test_a_bad_first_window_loads_no_model(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Choice, "load", lambda *_: pytest.fail("loaded"))
    predict_file(run_folder, tmp_path, [b"{"], code=2)


def test_pipes_and_gzip(run_folder, tmp_path, monkeypatch, capsys):
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b'\xef\xbb\xbf{"source": "the cat"}\r\n{"source": "a dog"}'))
    assert main(["predict", "--run", str(run_folder), "--input", str(source), "--output", "-"]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"source": "the cat"}\n{"source": "a dog"}\n')))
    assert main(["predict", "--run", str(run_folder), "--input", "-", "--output", "-"]) == 0
    assert capsys.readouterr().out == from_file
    assert [json.loads(line)["line"] for line in from_file.splitlines()] == [1, 2]
    source.write_bytes(source.read_bytes()[:-12])
    assert main(["predict", "--run", str(run_folder), "--input", str(source), "--output", "-"]) == 2
    assert "damaged or cut off after line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{in}", "--output", "-"], "give either --run DIR"),
        (["--run", "{run}", "--model", "x", "--input", "{in}", "--output", "-"], "give either --run DIR"),
        (
            ["--run", "{tmp}", "--input", "{in}", "--output", "-"],
            "no config.yaml; --run takes the folder of a finished run",
        ),
        (["--model", "nothing", "--input", "{in}", "--output", "-"], "--model nothing: no such folder"),
        (["--run", "{run}", "--input", "{tmp}/none", "--output", "-"], "--input .*none: no such file"),
        (["--run", "{run}", "--input", "{in}", "--output", "{tmp}/a/b"], "--output .*: no folder"),
        (["--run", "{run}", "--input", "{in}", "--output", "{in}"], "is also the input"),
        (["--run", "{run}", "--input", "{in}", "--output", "{tmp}"], "is a folder"),
        (
            ["--run", "{run}", "--input", "{in}", "--output", "-", "--task", "pears"],
            "unknown task 'pears'; did you mean 'pairs'",
        ),
        (
            ["--run", "{run}", "--input", "{in}", "--output", "-", "data.rot=x"],
            "unknown key 'data.rot'; did you mean 'data.root'",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(run_folder, tmp_path, monkeypatch, capsys, arguments, message):
    import re

    monkeypatch.setattr(Choice, "load", lambda *_: pytest.fail("loaded"))
    source = tmp_path / "in.jsonl"
    source.write_text('{"source": "x"}\n')
    places = {"in": source, "run": run_folder, "tmp": tmp_path}
    assert main(["predict", *(argument.format(**places) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.startswith("hdscale: error: ") and said.count("\n") == 1
    assert source.read_text() == '{"source": "x"}\n'


def test_millions_of_rows_in_bounded_memory(monkeypatch):
    """Rows are read no further than the window, and memory does not grow with their number."""
    read = 0

    class Lines(io.RawIOBase):
        def __iter__(self):
            nonlocal read
            for number in range(30_000):
                read += 1
                yield b'{"source": "%d %s"}\n' % (number, b"x" * 200)

    monkeypatch.setattr(Predictor, "__init__", lambda self: None)
    monkeypatch.setattr(Predictor, "answer", lambda self, group: [{"line": request.line} for request in group])
    requests = read_requests(Lines(), None, lambda name: None, lambda error: None)
    tracemalloc.start()
    for number, row in enumerate(Predictor().stream(requests, 1000), start=1):
        assert row["line"] == number
        assert read <= -(-number // 1000) * 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 30_000
    assert peak < 4e6, f"{peak / 1e6:.1f} MB for windows of 1,000 rows of 0.2 kB"


def predictor_of(choice: Choice, config: Config, **options) -> Predictor:
    loaded = choice.load(config)
    return Predictor(loaded.model, loaded.tokenizer, config.eval, config.data, loaded.task_id, **options)


def test_batches_are_halved_when_out_of_memory(run_folder, monkeypatch):
    choice = Choice(run=str(run_folder))
    config = choice.config()
    predictor = predictor_of(choice, config, batch_size=16)
    requests = lambda: [Request(number, None, None, text) for number, text in enumerate(TEXTS * 3, start=1)]  # noqa: E731
    whole = predictor.answer(requests())
    decode, sizes = Decoder.__call__, []

    def small(self, rows, numbers):
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("no")
        return decode(self, rows, numbers)

    monkeypatch.setattr(Decoder, "__call__", small)
    assert predictor.answer(requests()) == whole
    assert sizes == [16, 8, 4, 4, 4, 4, 2] and predictor.batch_size == 4
    monkeypatch.setattr(Decoder, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(UserError, match="not one row can be decoded"):
        predictor.answer(requests())


def test_labels_are_cut_and_free_text_is_not(run_folder, find_task):
    choice = Choice(run=str(run_folder))
    config = choice.config(["eval.num_beams=3"])
    predictor = predictor_of(choice, config)
    longest = max(len(predictor.tokenizer(label).input_ids) for label in ("no", "yes"))
    assert predictor.decoding(find_task("pairs")) == Decoding(longest, 3)
    assert predictor.decoding(None) == Decoding(6, 3)
    assert (predictor.task_id(find_task("squad")), predictor.task_id(None)) == (1, -1)


def test_predictions_are_replaced_only_if_asked_to(run_folder, tmp_path, capsys):
    predict_file(run_folder, tmp_path, [{"source": "cat one"}])
    before = (tmp_path / "out.jsonl").read_text()
    places = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["predict", "--run", str(run_folder), *places]) == 2
    assert "exists; replace it by --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == before
    assert len(predict_file(run_folder, tmp_path, [{"source": "cat two"}, {"source": "dog"}])) == 2


def test_a_task_that_the_model_does_not_know_is_refused() -> None:
    conditioned = SimpleNamespace(method=SimpleNamespace(needs_tasks=True))
    loaded = Loaded(conditioned, None, {"rte": 0, "cola": 1}, "v")
    assert loaded.task_id("cola") == 1
    for name, words in (("mnli", "does not know task mnli; it knows rte, cola"), (None, "does not know free text")):
        with pytest.raises(UserError, match=words):
            loaded.task_id(name)
        assert loaded.task_id(name, unseen="mean") == -1
    plain = Loaded(SimpleNamespace(method=SimpleNamespace(needs_tasks=False)), None, {"rte": 0}, "v")
    assert plain.task_id("mnli") == -1, "it computes the same whatever the task"
    assert Loaded(SimpleNamespace(), None, {}, "v").task_id("mnli") is None
