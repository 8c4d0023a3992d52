"""`hdscale evaluate` on runs, exports, other checkpoints and extractive ones; the span decoder against brute force."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForQuestionAnswering, T5Config, T5ForConditionalGeneration

from hdscale.commands.cli import main
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import get_task
from hdscale.evaluation import extractive
from hdscale.evaluation.extractive import (
    MAX_ANSWER_TOKENS,
    ExtractiveEvaluator,
    SpanDecoder,
    Window,
    best_span,
    windows_of,
)
from hdscale.evaluation.generation import Decoder
from hdscale.evaluation.settings import EvalSettings
from hdscale.load import Choice, Seq2Seq, version_of
from tests.helpers.evaluation_jobs import make_tasks, word_tokenizer


@pytest.fixture(scope="module")
def mrqa_data(tmp_path_factory) -> DataSettings:
    return make_tasks(tmp_path_factory.mktemp("mrqa"))[1]


def test_a_run_is_evaluated_and_resumed_after_an_interruption(run_folder, tmp_path, monkeypatch, capsys):
    arguments = ["evaluate", "--run", str(run_folder), "--output", str(tmp_path), "--batch-size", "2"]
    decode, batches = Decoder.__call__, []

    def counted(self, rows, numbers):
        batches.append(len(rows))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return decode(self, rows, numbers)

    monkeypatch.setattr(Decoder, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert main(arguments) == 0
    results = json.loads((tmp_path / "results.test.json").read_text())
    assert list(results["tasks"]) == ["pairs", "squad"]
    assert results["tasks"]["pairs"].keys() == {"accuracy"} and results["tasks"]["squad"].keys() == {
        "em",
        "f1",
    }
    chunks = results["notes"]["squad"]["chunks"]
    assert len(batches) == 4 + -(-chunks // 2) + 1, "only the batch that was interrupted is decoded twice"
    assert {"average", "in_domain_f1", "in_domain_em"} <= results.keys()
    printed = capsys.readouterr().out
    assert "accuracy" in printed and str(tmp_path)[:20] in printed
    done = len(batches)
    assert main(arguments) == 0 and len(batches) == done, "there is nothing left to decode"
    sample = [*arguments, "--tasks", "pairs", "--limit", "3"]
    assert main(sample) == 2 and len(batches) == done, "results of all rows are not replaced by those of a sample"
    assert "has results of another limit (None, now 3)" in capsys.readouterr().err
    assert main([*sample, "--overwrite"]) == 0 and len(batches) == done + 2
    (score,) = json.loads((tmp_path / "results.test.json").read_text())["scores"]
    assert (score["task"], score["split"], score["rows"], score["rows_in_split"]) == ("pairs", "test", 3, 7)


def test_results_of_other_tasks_stay(run_folder, tmp_path):
    arguments = ["evaluate", "--run", str(run_folder), "--output", str(tmp_path), "--tasks"]
    assert main([*arguments, "squad"]) == 0 and main([*arguments, "pairs"]) == 0
    found = json.loads((tmp_path / "results.test.json").read_text())
    assert set(found["tasks"]) == {"squad", "pairs"} and len(found["scores"]) == 2
    assert set(found["notes"]) == {"squad", "pairs"} and "in_domain_f1" in found


def test_another_model_does_not_replace_results(run_folder, tmp_path, capsys):
    arguments = ["--tasks", "pairs", "--output", str(tmp_path)]
    assert main(["evaluate", "--run", str(run_folder), *arguments]) == 0
    before = (tmp_path / "results.test.json").read_text()
    other = shutil.copytree(run_folder, tmp_path / "other")
    assert main(["evaluate", "--run", str(other), *arguments]) == 2
    assert "has results of another model" in capsys.readouterr().err
    assert (tmp_path / "results.test.json").read_text() == before


def test_an_export_and_its_run_agree(run_folder, tmp_path):
    """The export alone, with the run's base weights in a folder, predicts what the run does."""
    choice = Choice(run=str(run_folder))
    config = choice.config()
    loaded = choice.load(config)
    assert choice.load(config).version == loaded.version == version_of(run_folder / "adapter")
    other = tmp_path / "adapter"
    shutil.copytree(run_folder / "adapter", other)
    exported = Choice(model=str(other)).load(config)
    assert exported.task_ids == loaded.task_ids == {"pairs": 0, "squad": 1}
    for name in loaded.model.trainable_names():
        assert torch.equal(exported.model.get_parameter(name), loaded.model.get_parameter(name))


@pytest.fixture(scope="module")
def seq2seq_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "t5"
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_any_seq2seq_checkpoint(seq2seq_folder, mrqa_data, tmp_path):
    arguments = [
        "evaluate",
        "--model",
        str(seq2seq_folder),
        "--tasks",
        "squad",
        "--limit",
        "3",
        "--output",
        str(tmp_path),
    ]
    assert main([*arguments, f"data.mrqa_root={mrqa_data.mrqa_root}", f"data.cache={tmp_path}/cache"]) == 0
    results = json.loads((tmp_path / "results.test.json").read_text())
    assert results["notes"]["squad"]["rows"] == 3
    assert Choice(model=str(seq2seq_folder)).config([]).data.max_source_length == 128


def test_seq2seq_log_likelihood_is_the_sum_over_tokens(seq2seq_folder):
    model = Seq2Seq(T5ForConditionalGeneration.from_pretrained(seq2seq_folder)).eval()
    ids, labels = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[8, 9, 1], [1, -100, -100]])
    mask = (ids != 0).long()
    with torch.no_grad():
        found = model.log_likelihood(ids, mask, labels)
        for row, length in ((0, 3), (1, 1)):
            inputs = torch.cat([torch.zeros(1, 1, dtype=torch.long), labels[row : row + 1, : length - 1]], dim=1)
            logits = model.base(
                input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], decoder_input_ids=inputs
            ).logits[0]
            total = sum(torch.log_softmax(logits[n], -1)[labels[row, n]].item() for n in range(length))
            assert found[row].item() == pytest.approx(total, abs=1e-5)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.8,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def test_an_extractive_checkpoint_on_mrqa(bert_folder, mrqa_data, tmp_path):
    arguments = [
        "evaluate",
        "--model",
        str(bert_folder),
        "--tasks",
        "squad",
        "--output",
        str(tmp_path),
        "data.max_source_length=32",
    ]
    assert main([*arguments, f"data.mrqa_root={mrqa_data.mrqa_root}"]) == 0
    results = json.loads((tmp_path / "results.test.json").read_text())
    assert results["notes"]["squad"]["rows"] == 11 < results["notes"]["squad"]["chunks"]
    answers = json.loads((tmp_path / "squad.test.official.json").read_text())
    squad = get_task("squad", mrqa_data)
    from hdscale.data.tasks.mrqa.reader import questions

    for question in questions(squad, "test", mrqa_data):
        assert answers[question.qid] and answers[question.qid] in question.context


def test_the_batch_size_of_an_extractive_checkpoint_is_found_with_its_own_decoder(
    bert_folder, mrqa_data, tmp_path, monkeypatch
):
    """As on a GPU with memory for 100 windows."""
    tried = []

    def decode(self, rows, numbers):
        tried.append(len(rows))
        if len(rows) > 100:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(SpanDecoder, "device", torch.device("cuda"))
    monkeypatch.setattr(SpanDecoder, "__call__", decode)
    loaded = Choice(model=str(bert_folder)).load(Choice(model=str(bert_folder)).config())
    evaluator = ExtractiveEvaluator(
        model=loaded.model, tokenizer=loaded.tokenizer, settings=EvalSettings(), data=mrqa_data, folder=tmp_path
    )
    inputs = evaluator.inputs(get_task("squad", mrqa_data), "test", limit=3)
    assert evaluator.batch_size("squad.test", inputs) == 64 and tried == [512, 256, 128, 64]


def test_best_span_equals_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(30):
        size = int(draw.integers(3, 60))
        cut = int(draw.integers(1, size))
        offsets = [None] * cut + [(n * 2, n * 2 + 1) for n in range(size - cut)]
        if size - cut > 3:
            offsets[-1] = None
            offsets[cut + 1] = (2, 2)  # a token without characters
        window = Window("w", list(range(size)), [], offsets, "abcdefghij" * 20)
        starts, ends = draw.normal(size=size), draw.normal(size=size)
        usable = [n for n, offset in enumerate(offsets) if offset is not None and offset[0] < offset[1]]
        best = max(
            ((starts[i] + ends[j], i, j) for i in usable for j in usable if i <= j < i + MAX_ANSWER_TOKENS),
            default=None,
        )
        text, tokens, score = best_span(window, starts, ends)
        if best is None:
            assert text == ""
            continue
        assert score == pytest.approx(best[0])
        assert text == window.context[offsets[best[1]][0] : offsets[best[2]][1]] and tokens == best[2] - best[1] + 1


def test_extractive_windows_cover_the_context(bert_folder, mrqa_data):
    """Every character that is not white space lies in a window, as the tokenizer's own offsets say."""
    loaded = Choice(model=str(bert_folder)).load(Choice(model=str(bert_folder)).config())
    assert loaded.extractive and SpanDecoder.decoding.max_new_tokens == MAX_ANSWER_TOKENS
    squad = get_task("squad", mrqa_data)
    rows, examples, total = windows_of(squad, "test", loaded.tokenizer, mrqa_data, None)
    assert total == len({example.group for example in examples})
    covered: dict[str, set[int]] = {}
    for number, example in enumerate(examples):
        window = rows.row(number)
        assert len(window.input_ids) <= mrqa_data.max_source_length
        assert set(window.token_types) == {0, 1}
        covered.setdefault(example.group, set()).update(
            place for offset in window.offsets if offset for place in range(*offset)
        )
    contexts = {example.group: rows.row(number).context for number, example in enumerate(examples)}
    for group, context in contexts.items():
        assert covered[group] == {place for place, character in enumerate(context) if not character.isspace()}


def test_a_long_question_is_cut(bert_folder):
    loaded = Choice(model=str(bert_folder)).load(Choice(model=str(bert_folder)).config())
    assert extractive.shortened("who sat on mat ?", loaded.tokenizer, 3) == "who sat on"
    assert extractive.shortened("who sat", loaded.tokenizer, 3) == "who sat"


def test_an_empty_context_has_an_empty_span():
    window = Window("w", [5, 1, 1], [], [None, None, None], "")
    assert best_span(window, np.array([1.0, 0, 0]), np.array([2.0, 0, 0])) == ("", 0, 3.0)


@pytest.fixture(scope="module")
def models(run_folder, seq2seq_folder, bert_folder) -> dict[str, Path]:
    """A folder of each kind of model that can be evaluated."""
    return {"run": run_folder, "t5": seq2seq_folder, "bert": bert_folder}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{t5}"], "say which tasks to evaluate on"),
        (["--model", "{t5}", "--tasks", "sqad"], "unknown task 'sqad'; did you mean 'squad'"),
        (
            ["--run", "{run}", "--split", "train", "--tasks", "drop"],
            "task drop has no train split; it has: validation, test",
        ),
        (["--model", "{bert}", "--tasks", "pairs", "{custom}"], "only be evaluated on MRQA tasks"),
        (["--model", "{empty}", "--tasks", "squad"], "cannot be loaded"),
        (
            ["--run", "{run}", "--tasks", "squad", "data.mrqa_root=/nowhere"],
            "/nowhere/dev/SQuAD.jsonl.gz is missing",
        ),
        (["--run", "{run}", "--output", "/proc/x"], "--output /proc/x: cannot be written"),
    ],
)
def test_mistakes(models, mrqa_data, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"one": "cat", "label": "no"}\n')
    declared = "kind: label, labels: ['no', 'yes'], source: '{one}', target: '{label}'"
    custom = f"data.custom={{pairs: {{{declared}, files: {{test: {rows}}}}}}}"
    places = {**models, "empty": tmp_path, "custom": custom}
    extra = [] if any("mrqa_root" in argument for argument in arguments) else [f"data.mrqa_root={mrqa_data.mrqa_root}"]
    filled = [argument.format(**places) if argument.startswith("{") else argument for argument in arguments]
    assert main(["evaluate", *filled, *extra]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("hdscale: error: ")


def test_a_decoder_only_checkpoint_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(extractive.UserError, match="neither sequence-to-sequence nor extractive QA"):
        Choice(model=str(tmp_path)).kind()
