"""Tiny adapted models, random batches, and how they are compared with a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hdscale.modeling import AdaptedModel, HyperdecoderConfig, build_model
from hdscale.modeling.model import IGNORED
from tests.helpers.direct_t5 import DirectT5, Hooks
from tests.helpers.tiny import save_tiny_t5

VOCABULARY = 100
TASKS = ["cola", "rte", "sst2"]

SIZES = dict(encoder__dim=4, decoder__dim=3, hypernet__bottleneck=6)

# one of every kind of adaptation that travels through the decoder
METHODS = {
    "hyperdecoder": ("hyperdecoder", SIZES),
    "hyperdecoder, all forms": (
        "hyperdecoder",
        dict(SIZES, decoder__form="adapter+lora+prefix", lora__attention="all", lora__targets="qkvo", prefix__length=3,
             decoder__shared_layers="0", decoder__learned_scale=True),
    ),
    "hyperdecoder, a hypernetwork per layer": ("hyperdecoder", dict(SIZES, hypernet__per_layer=True)),
    "generated encoder": ("hyperdecoder", dict(SIZES, encoder__adapter="generated")),
    "adapter": ("adapter", dict(encoder__dim=4, decoder__dim=4)),
    "task_hypernet": ("task_hypernet", SIZES),
    "modular": ("modular", dict(lora__rank=2)),
    "lora": ("lora", dict(lora__rank=2)),
    "hyperformer": ("hyperformer", dict(hyperformer__dim=3)),
    "hyperformer++": ("hyperformer++", dict(hyperformer__dim=3)),
    "hyperprompt": ("hyperprompt", dict(hyperprompt__length=3, hyperprompt__bottleneck=4)),
    "full_finetuning": ("full_finetuning", {}),
}  # fmt: skip


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        branch = tree
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[last] = value
    return tree


def method_config(base: Path | str, name: str = "hyperdecoder", tasks: list[str] | None = None, **options: Any):
    """A configuration without dropout; options of `method.*` by dotted keys with __ for the dots."""
    method = nested({key.replace("__", "."): value for key, value in options.items()})
    return HyperdecoderConfig.from_dict(
        {
            "model": {"name": str(base), "dropout": 0.0},
            "method": {"name": name, **method},
            "tasks": TASKS if tasks is None else tasks,
        }
    )


def tiny_base(folder: Path, family: str = "v1.1") -> Path:
    """A tiny checkpoint with a small vocabulary: v1.0, v1.1, mt5 or umt5."""
    if family not in ("mt5", "umt5"):
        return save_tiny_t5(folder, vocabulary=VOCABULARY, tied=family == "v1.0")
    from transformers import MT5Config, MT5ForConditionalGeneration, UMT5Config, UMT5ForConditionalGeneration

    config_class, model_class = {
        "mt5": (MT5Config, MT5ForConditionalGeneration), "umt5": (UMT5Config, UMT5ForConditionalGeneration)
    }[family]  # fmt: skip
    config = config_class(
        vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    model.save_pretrained(folder)
    return folder


def shaken(model: AdaptedModel, seed: int = 5, size: float = 0.3) -> AdaptedModel:
    """The model with noise on all of the method's parameters, so that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.method.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * size).to(parameter.dtype))
    return model.eval()


def random_batch(seed: int = 3) -> dict[str, torch.Tensor]:
    """Three instances of unequal lengths; labels end in </s> (1)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (3, 7), generator=generator)
    labels = torch.randint(2, VOCABULARY, (3, 5), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    input_ids[1, 4:] = 0
    labels[:, 4] = 1
    labels[2, 2] = 1
    labels[2, 3:] = IGNORED
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "task_ids": torch.tensor([2, 0, 1]),
    }


def model_logits(model: AdaptedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [M, V] of the batch's label positions."""
    with torch.no_grad():
        encoded = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
        return model.decode(encoded, batch["labels"])[0]


def direct_logits(
    model: AdaptedModel,
    batch: dict[str, torch.Tensor],
    encoder_hooks: Callable[[int], Hooks],
    decoder_hooks: Callable[[int, torch.Tensor], Hooks],
    first_pass: Callable[[int], Hooks] | None = None,
    twice: Callable[[int, torch.Tensor], Hooks] | None = None,
) -> torch.Tensor:
    """The same logits computed instance by instance in float64.

    Args:
        encoder_hooks: of the instance's task id. decoder_hooks: of task id and encoding h [S, D].
        first_pass, twice: for an encoder that runs twice: hooks of its first pass, and of its second given the h of
            the first.
    """
    direct, found = DirectT5(model.base), []
    for row in range(batch["input_ids"].shape[0]):
        task = int(batch["task_ids"][row])
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        labels = batch["labels"][row][batch["labels"][row] != IGNORED]
        if first_pass is None:
            h = direct.encode(ids, encoder_hooks(task))
        else:
            h = direct.encode(ids, twice(task, direct.encode(ids, first_pass(task))))
        found.append(direct.logits(h, labels, decoder_hooks(task, h)))
    return torch.cat(found)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def double_model(config: HyperdecoderConfig, **arguments: Any) -> AdaptedModel:
    """Built in float64 with noise on its parameters."""
    return shaken(build_model(config, dtype=torch.float64, **arguments))
