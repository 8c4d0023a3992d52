"""`release: true`: a tiny hyperdecoder trained as the paper's release does, against a float64 computation of it.

What is computed here is written from facts about the release: its model, loss, clipping, schedule and AdamW. Dropout
and the order of the rows are left out, as they come from the release's random numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hdscale.modeling import build_model
from tests.helpers.adapted import SIZES, direct_logits, method_config, tiny_base
from tests.helpers.direct_hyperdecoder import Parallel, embedding, generated, learned
from tests.helpers.ranks import RankPool
from tests.helpers.release_jobs import STEPS, WARMUP, batch_of

JOB = "tests.helpers.release_jobs:train"
RATE, BETAS, EPSILON, CLIP, SMOOTHING = 3e-4, (0.9, 0.999), 1e-8, 1.0, 0.1
EDGE = 1e-5
"""Where a ReLU's input is this small beside the largest one, float32 can take the other side of it than float64."""


class Edges(TorchFunctionMode):
    """The smallest magnitude of a ReLU's input inside a `with`, relative to the largest input of the same ReLU."""

    nearest = math.inf

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.relu:
            size = args[0].detach().abs()
            self.nearest = min(self.nearest, float(size.min() / size.max()))
        return function(*args, **(kwargs or {}))


def smoothed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over tokens: 0.9 of the target's negative log-likelihood and 0.1 of the vocabulary's mean."""
    nll = torch.logsumexp(logits, dim=-1, keepdim=True) - logits
    return ((1 - SMOOTHING) * nll.gather(1, targets[:, None])[:, 0] + SMOOTHING * nll.mean(dim=-1)).sum()


def rate(step: int) -> float:
    """Linear from 0 over the warm-up, then linear to 0."""
    return RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def released_training(base: Path) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights after 20 steps in float64, losses, and gradients' norms before clipping."""
    model = build_model(method_config(base, **SIZES))
    d_model, layers = model.base.config.d_model, model.base.config.num_layers
    weights = {name: value.detach().double().requires_grad_() for name, value in model.method.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(step)
        logits = direct_logits(
            model,
            batch,
            lambda task: Parallel("encoder", learned(weights, "encoder", layers)),
            lambda task, h: Parallel(
                "decoder",
                generated(weights, "decoder", embedding(weights, "decoder", h), d_model, SIZES["decoder__dim"], layers),
            ),
        )
        loss = smoothed_loss(logits, batch["labels"][batch["labels"] != -100])
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        losses.append(loss.item())
        norms.append(norm)
        number = step + 1
        size = rate(step) * math.sqrt(1 - BETAS[1] ** number) / (1 - BETAS[0] ** number)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
                weight -= size * first[name] / (second[name].sqrt() + EPSILON)
    return {f"method.{name}": weight.detach() for name, weight in weights.items()}, losses, norms


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


@pytest.fixture(scope="module")
def expected(base: Path) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    with Edges() as edges:
        training = released_training(base)
    print(f"nearest to the edge of a ReLU: {edges.nearest:.1e}")
    assert edges.nearest > EDGE, "choose other batches"
    return training


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - wanted[name]).abs().max()) for name in wanted)


def test_twenty_steps_agree_with_the_release(rank_pool: RankPool, base: Path, expected) -> None:
    weights, losses, norms = expected
    found = rank_pool(1).run(JOB, {"base": str(base), "overrides": []})[0]
    moved = distance(found["after"], {name: value.double() for name, value in found["before"].items()})
    print(f"largest difference {distance(found['after'], weights):.1e}, largest movement {moved:.1e}")
    assert distance(found["after"], weights) < 1e-6 < moved / 1000
    assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > CLIP, "clipping acts"
    assert found["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(
    "override", ["train.label_smoothing=0.0", "train.loss_reduction=mean", "train.adam_epsilon=corrected"]
)
def test_each_of_its_settings_matters(rank_pool: RankPool, base: Path, expected, override: str) -> None:
    found = rank_pool(1).run(JOB, {"base": str(base), "overrides": [override]})[0]
    assert distance(found["after"], expected[0]) > 1e-6
