"""Pre-train the tiny T5 of the embedded default by span corruption on the generated language.

    python -m tools.quickstart.pretrain --to DIR [--steps 2000] [--seed 0] [--threads 2]

writes a folder that `AutoTokenizer` and `T5ForConditionalGeneration` load: weights (bf16), configuration,
tokenizer, and `pretraining.json` with how it was made. The text is drawn as it is read and never repeats,
so there is no dropout.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from hdscale.data.tasks.quickstart.language import documents
from tools.quickstart.tokenizer import SENTINELS, train_tokenizer

NOISE_DENSITY = 0.2
"""Share of a paragraph's tokens that are hidden (T5: 0.15; these paragraphs are short)."""

MEAN_SPAN = 2.0
"""Mean length of a hidden span in tokens (T5: 3)."""

HELD_OUT = 1000
"""Paragraphs of the held-out sample."""

Pair = tuple[list[int], list[int]]


def tiny_config(vocabulary: int) -> T5Config:
    """T5 v1.1 (gated GELU, untied output) at about 2 million parameters."""
    return T5Config(  # type: ignore[call-arg]  # transformers does not declare the arguments of its base class
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=320,
        num_layers=4,
        num_decoder_layers=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        n_positions=512,
    )


def corrupt(ids: list[int], first_sentinel: int, rng: random.Random) -> Pair:
    """T5's span corruption of one paragraph.

    Args:
        ids: the paragraph's tokens, `</s>` last; that one is never hidden.
        first_sentinel: id of `<extra_id_0>`; the following sentinels count down from it.

    Returns:
        The source with a sentinel for each hidden span; the target: each sentinel and what it hides, `</s>`.
    """
    body, end = ids[:-1], ids[-1]
    hidden = max(1, round(len(body) * NOISE_DENSITY))
    spans = min(max(1, round(hidden / MEAN_SPAN)), len(body) - hidden + 1, SENTINELS)
    lengths = composition(hidden, spans, rng)
    gaps = composition(len(body) - hidden + 2, spans + 1, rng)
    gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1  # only the outer two may be empty
    source: list[int] = []
    target: list[int] = []
    place = 0
    for i, length in enumerate(lengths):
        sentinel = first_sentinel - i
        source += [*body[place : place + gaps[i]], sentinel]
        place += gaps[i]
        target += [sentinel, *body[place : place + length]]
        place += length
    return [*source, *body[place:], end], [*target, end]


def composition(total: int, parts: int, rng: random.Random) -> list[int]:
    """`total` as a sum of `parts` numbers of at least 1, each such sum equally likely."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [right - left for left, right in zip([0, *cuts], [*cuts, total], strict=True)]


def pairs(tokenizer: PreTrainedTokenizerBase, seed: int | str) -> Iterator[Pair]:
    """Endless corrupted paragraphs, a function of the seed alone."""
    rng = random.Random(f"hdscale corruption {seed}")
    first_sentinel = cast(int, tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    text = documents(seed)
    while True:
        for ids in tokenizer(list(islice(text, 512))).input_ids:
            yield corrupt(ids, first_sentinel, rng)


def batches(stream: Iterator[Pair], size: int, rng: random.Random, pool: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches of similar length: the rows of `pool` batches, sorted, cut and shuffled."""
    while True:
        rows = sorted(islice(stream, size * pool), key=lambda pair: (len(pair[0]), len(pair[1])))
        cut = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(cut)
        yield from map(padded, cut)


def padded(rows: list[Pair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask [B, S] and labels [B, T] (-100 where padded)."""

    def pad(sequences: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, sequences))
        return torch.tensor([row + [value] * (width - len(row)) for row in sequences])

    input_ids = pad([source for source, _ in rows], 0)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "labels": pad([target for _, target in rows], -100),
    }


def untie_head(model: T5ForConditionalGeneration) -> None:
    """Give a model that was built from a configuration a separate head, as checkpoints from v1.1 on have.

    transformers 5 ties the head for every configuration of the T5 family, and unties it only while loading a
    checkpoint.
    """
    weight = torch.empty_like(model.lm_head.weight)
    torch.nn.init.normal_(weight, std=model.config.d_model**-0.5)
    model.lm_head.weight = torch.nn.Parameter(weight)
    model.all_tied_weights_keys.pop("lm_head.weight", None)


def corruption_loss(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, paragraphs: int) -> float:
    """Mean cross-entropy (nats a target token) on paragraphs of a seed that is never trained on."""
    rows = list(islice(pairs(tokenizer, "held out"), paragraphs))
    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 100):
            batch = padded(rows[start : start + 100])
            count = int((batch["labels"] != -100).sum())
            total += float(model(**batch).loss) * count
            tokens += count
    model.train()
    return total / tokens


def fresh_model(vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """The tiny T5 with random weights, without dropout, ready to be trained on a CPU.

    The embeddings start smaller than T5's own, so that the blocks count from the first step.
    """
    torch.manual_seed(seed)
    config = tiny_config(vocabulary)
    config.dropout_rate = 0.0
    model = T5ForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # under bf16, faster than the fused kernel at these sizes on a CPU
    untie_head(model)
    with torch.no_grad():
        model.shared.weight.mul_(0.3)
    for module in model.modules():
        if hasattr(module, "act"):
            module.act = torch.nn.GELU(approximate="tanh")  # the same function as gelu_new, in one kernel
    return model.train()


def optimizers(model: T5ForConditionalGeneration, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest, twenty times faster for position biases."""
    positions, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            positions.append(parameter)
        elif ".block." in name and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": positions, "lr": 20 * learning_rate}, {"params": others, "lr": learning_rate}]
    return [
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


def pretrain(
    tokenizer: PreTrainedTokenizerBase, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[T5ForConditionalGeneration, dict[int, float]]:
    """Train the tiny T5 from scratch: linear warm-up over 50 steps, then a cosine to zero.

    Returns:
        The model, and {step: loss of its batch} at twenty steps on the way.
    """
    model = fresh_model(len(tokenizer), seed)
    trainers = optimizers(model, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            trainer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))
        )
        for trainer in trainers
    ]
    stream = batches(pairs(tokenizer, seed), batch_size, random.Random(f"hdscale batches {seed}"))
    losses: dict[int, float] = {}
    columns = TextColumn("pre-training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps)
        for step, batch in enumerate(islice(stream, steps), start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for trainer, schedule in zip(trainers, schedules, strict=True):
                trainer.step()
                schedule.step()
            model.zero_grad()
            progress.advance(bar)
            if step % max(1, steps // 20) == 0:
                losses[step] = round(float(loss.detach()), 3)
                progress.console.print(f"step {step}: loss {losses[step]}")
    return model, losses


def finished(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """The trained weights in bf16, in a model whose configuration has T5's dropout for fine-tuning."""
    final = T5ForConditionalGeneration(tiny_config(model.config.vocab_size))
    untie_head(final)
    final.load_state_dict(model.state_dict())
    return torch.nn.Module.to(final, torch.bfloat16)


def main(arguments: list[str] | None = None) -> None:
    """Train tokenizer and model, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    args.to.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    tokenizer = train_tokenizer(args.seed)
    model, losses = pretrain(tokenizer, args.steps, args.batch_size, args.learning_rate, args.seed)
    model = finished(model)
    tokenizer.save_pretrained(args.to)
    model.save_pretrained(args.to)
    record = {
        "held_out_loss": round(corruption_loss(model.float(), tokenizer, HELD_OUT), 4),
        "uniform_loss": round(math.log(len(tokenizer)), 4),
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "threads": args.threads,
        "seconds": round(time.monotonic() - started),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.to / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
