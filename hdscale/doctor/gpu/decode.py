"""Decoding: the same tokens as on the CPU in float64, and how fast at base."""

from __future__ import annotations

import logging
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hdscale.bases.settings import ModelSettings
from hdscale.bench.engine_step import glue_batch
from hdscale.bench.timing import device_of, timed
from hdscale.bench.variants import hyperdecoder_settings
from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling.model import AdaptedModel
from hdscale.modeling.settings import HypernetSettings, MethodSettings, SideSettings

WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "4 beams": {"num_beams": 4}}
ROWS, SOURCE, TOKENS, TURNS = 64, 64, 32, 3
FEW = 8
"""Tokens that are compared."""


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `decode`."""
    logging.getLogger("hdscale.bases.loading").setLevel(logging.ERROR)
    device = device_of("cuda")
    generator = torch.Generator().manual_seed(0)
    for way, options in WAYS.items():
        with lines.check(f"{way}, small, float32: the tokens of float64 on the CPU") as found:
            found.say(compare_tokens(device, options))
    for way, options in WAYS.items():
        with lines.check(f"{way}, t5-v1_1-base, bf16") as found:
            model = build_model(hyperdecoder_settings("t5-v1_1-base"), torch.bfloat16, device).eval()
            ids = torch.randint(3, 32000, (ROWS, SOURCE), generator=generator).to(device)
            mask = torch.ones_like(ids)
            options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, **options}
            decode = partial(model.generate, ids, mask, **options)
            decode()
            taken = [timed(decode, device) for _ in range(TURNS)]
            seconds = statistics.median(taken)
            row = {
                "way": way, "rows": ROWS, "source": SOURCE, "tokens": TOKENS, "ms": 1e3 * seconds,
                "tokens/s": ROWS * TOKENS / seconds, "ms_per_token": 1e3 * seconds / TOKENS,
            }  # fmt: skip
            found.say(
                f"{row['tokens/s']:,.0f} tokens/s, {row['ms_per_token']:.1f} ms per token of {ROWS} rows", table=[row]
            )


def small_model(dtype: torch.dtype, device: torch.device) -> AdaptedModel:
    """The packaged base with adapters that change what it says, the same on every device."""
    encoder, decoder = SideSettings("manual", 64), SideSettings("generated", 32)
    method = MethodSettings("hyperdecoder", encoder, decoder, HypernetSettings(bottleneck=32))
    model = build_model(HyperdecoderConfig(ModelSettings("quickstart"), method), torch.float64, "cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.05)
    return model.to(device, dtype)


def compare_tokens(device: torch.device, options: dict[str, Any]) -> str:
    """How many rows decode to the same tokens, if all do.

    Raises:
        Wrong: if some do not.
    """
    (batch,) = glue_batch("tiny-1", 32, 1 << 20)
    found = []
    for dtype, place in ((torch.float64, torch.device("cpu")), (torch.float32, device)):
        model = small_model(dtype, place)
        ids = (batch["input_ids"] % model.base.config.vocab_size).to(place)
        mask = batch["attention_mask"].to(place)
        found.append(model.generate(ids, mask, max_new_tokens=FEW, min_new_tokens=FEW, **options).cpu())
    expected, tokens = found
    if expected.shape != tokens.shape:
        raise Wrong(f"shapes {tuple(tokens.shape)} instead of {tuple(expected.shape)}")
    unlike = int((expected != tokens).any(dim=1).sum())
    if unlike:
        raise Wrong(f"{unlike} of {len(tokens)} rows decode to other tokens")
    kinds = len({tuple(row) for row in tokens.tolist()})
    return f"{len(tokens)} rows of {FEW} tokens are equal ({kinds} different answers)"
