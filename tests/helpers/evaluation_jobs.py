"""A tiny model, tokenizer and data for the evaluation tests, and the jobs that their rank processes run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hdscale.data.settings import DataSettings
from hdscale.data.task import Task
from hdscale.data.tasks.custom import task_from_mapping
from hdscale.engine.tuning import largest_that_fits
from hdscale.evaluation.evaluator import EvaluationStopped, Evaluator
from hdscale.evaluation.settings import EvalSettings

WORDS = "cat dog sat on mat hat red blue green ran far away who what where question context : ? . 0 1".split()


def word_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A fast tokenizer of whole words and punctuation (pad 0, </s> 1, <unk> 2)."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=10**9,
    )


class TinyModel(torch.nn.Module):
    """A random T5 behind the two methods that evaluation calls; counts the batches that it generates."""

    def __init__(self, vocabulary: int = 64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=vocabulary,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        self.base = T5ForConditionalGeneration(config)
        with torch.no_grad():  # far from uniform, and </s> likely: different rows give different texts and lengths
            for parameter in self.base.parameters():
                parameter.mul_(3.0)
        self.batches: list[int] = []
        self.arguments: dict[str, Any] = {}
        self.task_ids: list[int] = []

    def generate(self, input_ids, attention_mask, task_ids=None, **arguments):
        assert not self.base.training
        self.batches.append(len(input_ids))
        self.arguments = arguments
        self.task_ids += [] if task_ids is None else task_ids.tolist()
        return self.base.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)

    def log_likelihood(self, input_ids, attention_mask, labels, task_ids=None):
        logits = self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
        token = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return -token.sum(dim=1)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_tasks(folder: Path, rows: int = 23) -> tuple[dict[str, Task], DataSettings]:
    """A label and a text task of `rows` rows each, and a chunked QA task (some questions with several chunks)."""
    generator = torch.Generator().manual_seed(1)

    def words(most: int) -> str:
        count = int(torch.randint(1, most, (), generator=generator))
        return " ".join(WORDS[int(n)] for n in torch.randint(0, len(WORDS) - 6, (count,), generator=generator))

    table = [{"text": words(40), "label": str(n % 2), "answer": words(5)} for n in range(rows)]
    data = write_rows(folder / "rows.jsonl", table)
    passages: list[dict[str, Any]] = [{"header": {"dataset": "tiny", "split": "dev"}}]
    for number in range(rows // 2):
        context = words(70)
        first = context.split()[0]
        answers = [{"text": first, "char_spans": [[0, len(first) - 1]]}]
        question = {
            "qid": f"q{number}",
            "question": words(4) + " ?",
            "answers": [first],
            "detected_answers": answers,
        }
        passages.append({"context": context, "qas": [question]})
    own = {"source": "{text}", "target": "{answer}", "files": {"test": data}}
    label = task_from_mapping(
        {
            "name": "labelled",
            "kind": "label",
            "labels": ["0", "1"],
            **own,
            "target": "{label}",
            "metrics": ["accuracy", "f1"],
        }
    )
    text = task_from_mapping(
        {"name": "written", "kind": "text", **own, "decoding": {"num_beams": 3, "max_target_length": 9}}
    )
    from hdscale.data.tasks.mrqa.tasks import tasks as mrqa_tasks

    settings = DataSettings(
        cache=str(folder / "cache"),
        mrqa_root=str(folder / "mrqa"),
        max_source_length=32,
        chunk_overlap=8,
        max_target_length=8,
    )
    (folder / "mrqa" / "dev").mkdir(parents=True)
    write_rows(folder / "mrqa" / "dev" / "SQuAD.jsonl", passages)
    squad = next(task for task in mrqa_tasks(settings) if task.name == "squad")
    return {"labelled": label, "written": text, "squad": squad}, settings


def evaluate_job(
    ranks: Any,
    tasks: list[Task],
    data: DataSettings,
    folder: str,
    stop_after: int | None = None,
    step: int = 7,
    batch_size: int | None = 4,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate tasks on their test splits; with `stop_after`, `should_stop` is true after that many calls.

    Args:
        options: further arguments of `Evaluator`.
    """
    model, tokenizer = TinyModel(), word_tokenizer()
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return ranks is not None and not ranks.all_true(stop_after is None or calls <= stop_after)

    seen: list[tuple[str, int, int]] = []
    try:
        evaluator = Evaluator(
            model=model,
            tokenizer=tokenizer,
            task_ids={"written": 5},
            settings=EvalSettings(batch_size=batch_size),
            data=data,
            folder=Path(folder),
            ranks=ranks,
            should_stop=should_stop,
            **options,
        )
        found = evaluator.evaluate(tasks, "test", step, limit, lambda *news: seen.append(news))
    except EvaluationStopped:
        return {"stopped": True, "batches": model.batches, "calls": calls}
    return {
        "stopped": False,
        "metrics": found.metrics(),
        "averages": found.averages(),
        "batches": model.batches,
        "calls": calls,
        "progress": seen,
        "notes": found.notes(),
        "task_ids": model.task_ids,
    }


def batch_size_job(ranks: Any, capacity: list[int]) -> int:
    """Each rank has memory for `capacity[rank]` rows."""

    def attempt(size: int) -> None:
        if size > capacity[ranks.rank]:
            raise torch.OutOfMemoryError("no")

    return largest_that_fits(attempt, ranks, largest=64)


def failing_job(ranks: Any, folder: str) -> None:
    """Rank 0 fails; every rank must get the error."""
    ranks.on_main(Path(folder, "missing", "x").read_text)
