"""The evaluation loop: global batches, ranks, part files, resuming after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdscale.data.batches import Row
from hdscale.data.sample import sample_rows
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import Example, get_task
from hdscale.errors import UserError
from hdscale.evaluation import evaluator as evaluator_module
from hdscale.evaluation import generation
from hdscale.evaluation.evaluator import BATCH_SIZES, Evaluator, SplitInputs
from hdscale.evaluation.generation import (
    SCORE_DECIMALS,
    Decoder,
    Decoding,
    Prediction,
    global_batches,
    log_of_rest,
    pad_sources,
    task_decoding,
)
from hdscale.evaluation.mrqa_protocol import best_answer
from hdscale.evaluation.predictions import PredictionFiles, batch_line
from hdscale.evaluation.settings import EvalSettings
from hdscale.files import json_line
from hdscale.runs.ranks import SingleProcess
from tests.helpers.evaluation_jobs import TinyModel, evaluate_job, make_tasks, word_tokenizer
from tests.helpers.ranks import RankFailure

JOB = "tests.helpers.evaluation_jobs:evaluate_job"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tasks on 23 rows (uneven for every number of ranks and batch size used), and their evaluation by one process."""
    folder = tmp_path_factory.mktemp("evaluation")
    tasks, data = make_tasks(folder)
    whole = evaluate_job(SingleProcess(), list(tasks.values()), data, str(folder / "whole"))
    return tasks, data, folder / "whole", whole


def contents(folder: Path) -> dict[str, bytes]:
    """All prediction files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_global_batches_hold_each_row_once_longest_first(lengths, size):
    batches = global_batches(lengths, size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size
    ordered = [lengths[row] for row in rows]
    assert ordered == sorted(ordered, reverse=True)


def test_predictions_hold_every_row_in_order(world):
    tasks, data, folder, whole = world
    for name in ("labelled", "written"):
        records = [json.loads(line) for line in (folder / f"{name}.test.jsonl").read_text().splitlines()]
        assert [record["id"] for record in records] == [f"test-{row}" for row in range(23)]
        assert len({record["prediction"] for record in records}) > 3 or name == "labelled"
    chunks = [json.loads(line) for line in (folder / "squad.test.jsonl").read_text().splitlines()]
    assert len({chunk["question"] for chunk in chunks}) == 11 < len(chunks) == whole["notes"]["squad"]["chunks"]
    assert all(round(chunk["score"], SCORE_DECIMALS) == chunk["score"] < 0 for chunk in chunks)
    assert not list(folder.glob("*.part*"))
    assert max(len(whole["batches"]), 1) == whole["calls"]


def test_one_and_three_ranks_write_the_same_bytes(world, rank_pool, tmp_path):
    tasks, data, folder, whole = world
    found = {}
    for size in (1, 3):
        results = rank_pool(size).run(
            JOB, {"tasks": list(tasks.values()), "data": data, "folder": str(tmp_path / str(size))}
        )
        found[size] = contents(tmp_path / str(size))
        assert all(result["metrics"] == whole["metrics"] for result in results)
        assert all(result["averages"] == whole["averages"] for result in results)
        assert len({result["calls"] for result in results}) == 1, "should_stop must be called equally often"
        assert sum(len(result["batches"]) for result in results) == len(whole["batches"])
        assert results[0]["progress"][-1] == ("squad", *(2 * [whole["notes"]["squad"]["chunks"]]))
    assert found[1] == found[3]
    assert len(found[1]) == 3


def test_an_interrupted_evaluation_resumes_with_another_number_of_ranks(world, rank_pool, tmp_path):
    tasks, data, folder, whole = world
    job = {"tasks": list(tasks.values()), "data": data, "folder": str(tmp_path)}
    first = rank_pool(2).run(JOB, job | {"stop_after": 2})
    assert all(result["stopped"] for result in first)
    assert list(tmp_path.glob("*.part*"))
    second = rank_pool(3).run(JOB, job | {"stop_after": 3})
    assert all(result["stopped"] for result in second)
    last = evaluate_job(SingleProcess(), list(tasks.values()), data, str(tmp_path))
    done = sum(len(result["batches"]) for result in [*first, *second])
    assert done > 4 and len(last["batches"]) == len(whole["batches"]) - done, "no batch is decoded twice"
    assert last["metrics"] == whole["metrics"]
    assert contents(tmp_path) == contents(folder)


def test_only_the_batch_of_an_incomplete_line_is_decoded_again(world, tmp_path):
    tasks, data, folder, whole = world
    one = [tasks["written"]]
    assert evaluate_job(SingleProcess(), one, data, str(tmp_path), stop_after=3)["stopped"]
    part = next(tmp_path.glob("*.part0.jsonl"))
    part.write_bytes(part.read_bytes()[:-20])
    assert len(evaluate_job(SingleProcess(), one, data, str(tmp_path))["batches"]) == 6 - 2
    assert contents(tmp_path)["written.test.jsonl"] == contents(folder)["written.test.jsonl"]


def test_a_crash_during_a_batch_loses_only_that_batch(world, tmp_path, monkeypatch):
    tasks, data, folder, whole = world
    generate = TinyModel.generate

    def fails_at_the_third(self, *args, **kwargs):
        if len(self.batches) == 2:
            raise RuntimeError("power cut")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TinyModel, "generate", fails_at_the_third)
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate_job(SingleProcess(), [tasks["written"]], data, str(tmp_path))
    monkeypatch.undo()
    again = evaluate_job(SingleProcess(), [tasks["written"]], data, str(tmp_path))
    assert len(again["batches"]) == 6 - 2
    assert contents(tmp_path)["written.test.jsonl"] == contents(folder)["written.test.jsonl"]


def test_finished_predictions_are_used_again_only_for_the_same_step_rows_and_batches(world, tmp_path):
    tasks, data, folder, whole = world
    one = [tasks["labelled"]]
    run = lambda **changes: len(evaluate_job(SingleProcess(), one, data, str(tmp_path), **changes)["batches"])  # noqa: E731
    assert run() == 6
    assert run() == 0
    assert run(step=8) == 6
    assert run(step=8, limit=10) == 3
    assert run(step=8, limit=10, batch_size=5) == 2
    (tmp_path / "labelled.test.stamp.json").write_text("{")
    assert run(step=8, limit=10, batch_size=5) == 2


def test_parts_of_another_step_are_not_mixed_in(world, tmp_path):
    tasks, data, folder, whole = world
    assert evaluate_job(SingleProcess(), [tasks["written"]], data, str(tmp_path), stop_after=4, step=6)["stopped"]
    assert len(evaluate_job(SingleProcess(), [tasks["written"]], data, str(tmp_path))["batches"]) == 6
    assert contents(tmp_path)["written.test.jsonl"] == contents(folder)["written.test.jsonl"]


def test_a_limit_keeps_whole_questions(world, tmp_path):
    tasks, data, folder, whole = world
    found = evaluate_job(SingleProcess(), [tasks["squad"]], data, str(tmp_path), limit=4)
    chunks = [json.loads(line) for line in (tmp_path / "squad.test.jsonl").read_text().splitlines()]
    every = [json.loads(line) for line in (folder / "squad.test.jsonl").read_text().splitlines()]
    questions = list(dict.fromkeys(chunk["question"] for chunk in every))
    sample = {questions[number] for number in sample_rows(len(questions), 4)}
    assert [chunk["id"] for chunk in chunks] == [chunk["id"] for chunk in every if chunk["question"] in sample]
    notes = found["notes"]["squad"]
    assert (notes["rows"], notes["rows_in_split"]) == (4, len(questions))


def test_a_sample_is_the_same_at_one_and_three_ranks(rank_pool, world, tmp_path):
    tasks, data, folder, whole = world
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    job = "tests.helpers.evaluation_jobs:evaluate_job"
    for ranks, place in ((1, alone), (3, together)):
        wanted = [tasks["squad"], tasks["labelled"]]
        rank_pool(ranks).run(job, {"tasks": wanted, "data": data, "folder": place, "limit": 5})
    for name in ("squad", "labelled"):
        files = [(Path(place) / f"{name}.test.jsonl").read_bytes() for place in (alone, together)]
        assert files[0] == files[1] and files[0]


def test_batch_size_is_found_once_and_stored(world, tmp_path, monkeypatch):
    tasks, data, folder, whole = world
    monkeypatch.setattr(evaluator_module, "CPU_BATCH_SIZE", 5)
    assert evaluate_job(SingleProcess(), [tasks["labelled"]], data, str(tmp_path), batch_size=None)["batches"] == [
        5,
        5,
        5,
        5,
        3,
    ]
    monkeypatch.setattr(evaluator_module, "CPU_BATCH_SIZE", 9)
    assert (
        evaluate_job(SingleProcess(), [tasks["labelled"]], data, str(tmp_path), batch_size=None, step=8)["batches"][0]
        == 5
    )
    assert json.loads((tmp_path / BATCH_SIZES).read_text()) == {"labelled.test": 5}


def test_batch_size_fits_every_rank(rank_pool):
    assert rank_pool(2).run("tests.helpers.evaluation_jobs:batch_size_job", {"capacity": [40, 9]}) == [8, 8]


class GpuDecoder:
    """Stands in for a decoder on a GPU with memory for `capacity` rows of ten tokens and twenty generated ones."""

    device = torch.device("cuda")

    def __init__(self, capacity: float, decoding: Decoding = Decoding(20)) -> None:
        self.capacity, self.decoding = capacity, decoding
        self.tried: list[tuple[int, int]] = []

    def at_full_length(self) -> GpuDecoder:
        full = GpuDecoder(self.capacity, Decoding(20, min_new_tokens=20))
        full.tried = self.tried
        return full

    def __call__(self, rows: list, numbers: list[int]) -> list[Prediction]:
        assert len({row.id for row in rows}) == 1 and len(rows) == len(numbers)
        tokens = max(len(row.input_ids) for row in rows) + self.decoding.min_new_tokens
        self.tried.append((len(rows), tokens))
        if len(rows) * tokens > 30 * self.capacity:
            raise torch.OutOfMemoryError("no")
        return []


class Lines:
    """The first of rows of 3, 10 and 7 tokens."""

    def __init__(self, count: int) -> None:
        self.source_lengths = (3, 10, 7)[:count]

    def __len__(self) -> int:
        return len(self.source_lengths)

    def row(self, number: int) -> Row:
        return Row([1] * self.source_lengths[number], [], 0, str(number), "t")


def gpu_evaluator(folder: Path) -> Evaluator:
    return Evaluator(
        model=TinyModel(), tokenizer=word_tokenizer(), settings=EvalSettings(), data=DataSettings(), folder=folder
    )


def test_the_batch_size_is_that_of_the_longest_row_with_the_longest_answer(tmp_path):
    decoder = GpuDecoder(capacity=40)
    inputs = SplitInputs(Lines(3), [Example("s", "t", "t", str(number)) for number in range(3)], decoder, 3)
    assert gpu_evaluator(tmp_path).batch_size("t.test", inputs) == 32
    assert decoder.tried == [(size, 30) for size in (512, 256, 128, 64, 32)]
    shorter = SplitInputs(Lines(1), inputs.examples[:1], decoder, 1)
    decoder.tried.clear()
    assert gpu_evaluator(tmp_path).batch_size("t.first", shorter) == 32, "64 rows of 23 tokens do not fit"
    assert decoder.tried[-1] == (32, 23), "rows beyond the examples are not read"


def test_batch_sizes_of_version_0_1_are_read(tmp_path):
    (tmp_path / "batch_sizes.json").write_text(json.dumps({"t.test": 24}, indent=1))
    decoder = GpuDecoder(capacity=40)
    inputs = SplitInputs(Lines(1), [Example("s", "t", "t", "0")], decoder, 1)
    evaluator = gpu_evaluator(tmp_path)
    assert evaluator.batch_size("t.test", inputs) == 24 and not decoder.tried
    evaluator.batch_size("t.validation", inputs)
    assert json.loads((tmp_path / "batch_sizes.json").read_text()) == {"t.test": 24, "t.validation": 32}


def test_no_memory_for_one_row(tmp_path):
    inputs = SplitInputs(Lines(1), [Example("s", "t", "t", "0")], GpuDecoder(capacity=0.5), 1)
    with pytest.raises(UserError, match="not one row"):
        gpu_evaluator(tmp_path).batch_size("t.test", inputs)
    assert not (tmp_path / "batch_sizes.json").exists()


def test_an_error_on_rank_0_reaches_every_rank(rank_pool, tmp_path):
    with pytest.raises(RankFailure, match="No such file"):
        rank_pool(2).run("tests.helpers.evaluation_jobs:failing_job", {"folder": str(tmp_path)})


def test_label_tasks_stop_at_their_longest_label(world):
    tasks, data, _, _ = world
    tokenizer = word_tokenizer()
    assert task_decoding(tasks["labelled"], tokenizer, EvalSettings(), 64) == Decoding(2, 1)
    assert task_decoding(tasks["written"], tokenizer, EvalSettings(), 64) == Decoding(9, 3)
    squad = task_decoding(tasks["squad"], tokenizer, EvalSettings(num_beams=2), 8)
    assert (squad.max_new_tokens, squad.num_beams, squad.min_new_tokens) == (64, 2, 0)


def test_summaries_have_their_own_beams_and_are_never_empty():
    for name, beams in (("xsum", 6), ("cnn_dailymail", 4), ("wiki_lingua", 4)):
        assert task_decoding(get_task(name), word_tokenizer(), EvalSettings(), 128) == Decoding(60, beams, 1)


def test_the_release_counts_the_start_token_among_a_predictions_tokens(world):
    settings = EvalSettings(count_start_token=True)
    tasks = [get_task("xsum"), get_task("squad"), world[0]["labelled"]]
    found = [task_decoding(task, word_tokenizer(), settings, 128).max_new_tokens for task in tasks]
    assert found == [59, 63, 1]


def rows_of(texts: list[str]) -> list:
    tokenizer = word_tokenizer()
    return [Row(tokenizer(text).input_ids, [1], 0, f"r{number}", "t") for number, text in enumerate(texts)]


def test_scores_are_summed_log_likelihoods_with_the_end_token():
    """Against a loop over positions of the model's own softmax, one row at a time; the empty answer is scored too."""
    model, tokenizer = TinyModel().eval(), word_tokenizer()
    rows = rows_of(["cat sat on mat", "who ran", "red red blue green far away dog", "where ?"])
    with torch.no_grad():  # </s> likelier, so that lengths differ
        model.base.shared.weight[1] *= 1.5
    found = Decoder(model, tokenizer, Decoding(6), scored=True)(rows, range(4))
    generated = model.base.generate(
        input_ids=pad_sources([row.input_ids for row in rows], 0, "cpu")[0],
        attention_mask=pad_sources([row.input_ids for row in rows], 0, "cpu")[1], max_new_tokens=6, do_sample=False,
    )  # fmt: skip
    for row, prediction, ids in zip(rows, found, generated.tolist(), strict=True):
        ids = ids[1:]
        ids = ids[: ids.index(1) + 1] if 1 in ids else ids
        total = 0.0
        for position, token in enumerate(ids):
            logits = model.base(
                input_ids=torch.tensor([row.input_ids]),
                decoder_input_ids=torch.tensor([[0, *ids[:position]]]),
            ).logits[0, -1]
            total += torch.log_softmax(logits, dim=-1)[token].item()
        assert prediction.score == pytest.approx(total, abs=2e-3)
        assert prediction.tokens == len(ids)
    with torch.no_grad():
        empty = model.log_likelihood(*pad_sources([rows[0].input_ids], 0, "cpu"), torch.tensor([[1]]))
    assert empty.shape == (1,) and empty.item() < 0


def test_without_empty_answers_the_first_token_is_chosen_and_scored_among_the_others():
    """Against a loop in float64 that leaves </s> out of the first position's softmax."""
    model, tokenizer = TinyModel().eval().double(), word_tokenizer()
    rows = rows_of(["cat sat on mat", "who ran", "red red blue green far away dog", "where ?"])
    with torch.no_grad():  # </s> so likely that some answers are empty
        model.base.shared.weight[1] *= 3.0
    squad = get_task("squad")
    usual = task_decoding(squad, tokenizer, EvalSettings(), 8)
    never = task_decoding(squad, tokenizer, EvalSettings(mrqa_empty=False), 8)
    assert not usual.without_empty and never.without_empty and never.min_new_tokens == 1
    assert "" in [found.text for found in Decoder(model, tokenizer, usual, scored=True)(rows, range(4))]
    for row, prediction in zip(rows, Decoder(model, tokenizer, never, scored=True)(rows, range(4)), strict=True):
        ids: list[int] = []
        total = 0.0
        while ids[-1:] != [1] and len(ids) < never.max_new_tokens:
            logits = model.base(
                input_ids=torch.tensor([row.input_ids]), decoder_input_ids=torch.tensor([[0, *ids]])
            ).logits[0, -1]
            if not ids:
                logits[1] = -torch.inf
            ids.append(int(logits.argmax()))
            total += torch.log_softmax(logits, dim=-1)[ids[-1]].item()
        assert prediction.tokens == len(ids) > 1
        assert prediction.score == pytest.approx(total, abs=2e-4)


def test_the_answer_of_two_chunks_with_and_without_empty_answers():
    """A: P(</s>) .90, P(X) .09. B: P(Y) .50. Ours is Y; the release's is X, as .09 / .10 > .50."""
    empty = torch.tensor([0.90, 0.0]).log()
    chosen = torch.tensor([0.09, 0.50]).log().double()
    ours = [{"prediction": "", "score": empty[0].item(), "tokens": 1}]
    chunk_b = {"prediction": "Y", "score": chosen[1].item(), "tokens": 1}
    assert best_answer([*ours, chunk_b]) == "Y"
    released = (chosen - log_of_rest(empty)).tolist()
    assert released[0] == pytest.approx(math.log(0.9), abs=1e-5)
    assert (
        best_answer([{"prediction": "X", "score": released[0], "tokens": 1}, {**chunk_b, "score": released[1]}]) == "X"
    )
    assert log_of_rest(torch.tensor([0.0])).isfinite().all()


def test_sources_are_padded_on_the_right_and_masked_by_length():
    """A padding id inside a source is a token like any other."""
    input_ids, mask = pad_sources([[5, 0, 1], [7]], 0, "cpu")
    assert input_ids.tolist() == [[5, 0, 1], [7, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == mask.dtype == torch.int64


def test_kept_tokens_end_with_the_first_end_token():
    generated = torch.tensor([[5, 1, 0, 0], [1, 0, 0, 0], [5, 6, 7, 8], [5, 1, 6, 1]])
    kept = generation.tokens_kept(generated, eos_id=1, pad_id=0)
    assert kept.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_dropout_is_off_and_the_training_flag_is_restored():
    model, tokenizer = TinyModel().train(), word_tokenizer()
    rows = rows_of(["cat sat on mat", "who ran"])
    one = Decoder(model, tokenizer, Decoding(5), scored=True)(rows, [0, 1])
    assert model.training and model.base.training
    assert one == Decoder(model, tokenizer, Decoding(5), scored=True)(rows, [0, 1])


def test_task_ids_reach_the_model(world):
    """The tasks in order: one that the model does not know, one that it knows as 5, one that it does not know."""
    chunks = world[3]["notes"]["squad"]["chunks"]
    assert world[3]["task_ids"] == [-1] * 23 + [5] * 23 + [-1] * chunks


def test_lockstep_ranks_make_equally_many_passes(world, rank_pool, tmp_path):
    """ZeRO-3 gathers weights collectively: a rank without a batch repeats one, and generates as long as the others."""
    tasks, data, folder, whole = world
    job = {
        "tasks": [tasks["written"]],
        "data": data,
        "folder": str(tmp_path),
        "batch_size": 6,
        "lockstep": True,
    }
    results = rank_pool(3).run(JOB, job)
    assert [len(result["batches"]) for result in results] == [2, 2, 2]
    assert results[0]["metrics"]["written"] == whole["metrics"]["written"]


def test_an_empty_split_is_a_users_mistake(world, tmp_path):
    tasks, data, _, _ = world
    with pytest.raises(UserError, match="its test split has no rows"):
        evaluate_job(SingleProcess(), [tasks["labelled"]], data, str(tmp_path), limit=0)


def test_merge_refuses_missing_rows(world, tmp_path):
    tasks, data, _, _ = world
    assert evaluate_job(SingleProcess(), [tasks["labelled"]], data, str(tmp_path), stop_after=2)["stopped"]
    part = next(tmp_path.glob("*.part0.jsonl"))
    stamp = json.loads(part.read_text().splitlines()[0])
    examples = [None] * 23
    with pytest.raises(RuntimeError, match="15 of 23 rows are in no part file"):
        PredictionFiles(tmp_path, "labelled.test", stamp).merge(examples, False, 0.0)
    assert not (tmp_path / "labelled.test.jsonl").exists()


def test_a_full_disk_leaves_no_incomplete_predictions(tmp_path, monkeypatch):
    files = PredictionFiles(tmp_path, "t.test", {"step": 1})
    files.path.write_text("old\n")
    part = [json_line(files.stamp), batch_line(0, [Prediction(0, "a", "new", 1)])]
    files.part(0).write_text("".join(part))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.merge([Example("s", "t", "t", "a")], False, 0.0)
    assert files.path.read_text() == "old\n" and not files.is_complete()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.test.jsonl", "t.test.part0.jsonl"]
    monkeypatch.undo()
    files.merge([Example("s", "t", "t", "a")], False, 0.0)
    assert files.records()[0]["prediction"] == "new" and files.is_complete() and not files.parts()
