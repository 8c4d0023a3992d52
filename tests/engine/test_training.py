"""The training step: one gradient however the batch is cut, the same under every ZeRO stage, and loud failures."""

from __future__ import annotations

import math

import pytest
import torch

from hdscale.engine.deepspeed_engine import dropout_seed
from hdscale.engine.optimizer import build_optimizer, learning_rate_factor
from hdscale.ops.backend import availability
from tests.helpers.tiny import save_tiny_t5
from tests.helpers.toy import ZERO, ToyModel, global_batch, settings


def reference_gradient(reduction: str = "mean", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The gradient of the whole batch's loss by plain autograd in float64, at weights rounded to `dtype`."""
    model = ToyModel(dropout=0.0).to(dtype).double()
    batch = global_batch(0)
    loss_sum, tokens = model(**batch)
    (loss_sum / tokens if reduction == "mean" else loss_sum).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Largest difference relative to the largest entry of each tensor."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name].double() - value.double()).abs().max() / value.abs().max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("world_size, micro", [(1, 8), (1, 3), (2, 4), (2, 1), (4, 2)])
def test_gradient_is_that_of_the_global_batch(rank_pool, world_size, micro):
    for found in rank_pool(world_size).run("tests.helpers.engine_jobs:gradient", {"micro": micro}):
        assert_close(found, reference_gradient(), 1e-5)


def test_gradient_of_the_sum(rank_pool):
    results = rank_pool(2).run("tests.helpers.engine_jobs:gradient", {"micro": 2, "loss_reduction": "sum"})
    assert_close(results[0], reference_gradient("sum"), 1e-5)


def test_every_zero_stage_trains_alike(rank_pool):
    """Same losses to bf16's rounding; masters and working weights identical on all ranks."""
    results = rank_pool(2).run(
        "tests.helpers.engine_jobs:train", {"variants": list(ZERO.values()), "steps": 6, "micro": 2}
    )
    first, second = results
    for (name, _), here, there in zip(ZERO.items(), first, second, strict=True):
        assert here["losses"] == there["losses"], name
        assert here["losses"] == pytest.approx(first[1]["losses"], abs=2e-3), name
        for kind in ("masters", "weights"):
            assert all(torch.equal(here[kind][key], there[kind][key]) for key in here[kind]), (name, kind)
        trained = [key for key in here["masters"]]
        rounded = {key: here["masters"][key].bfloat16().float() for key in trained}
        assert all(torch.equal(rounded[key], here["weights"][key]) for key in trained), name
    assert first[1]["losses"][-1] != first[1]["losses"][0]


def test_world_sizes_follow_each_other(rank_pool):
    """Without dropout 1, 2 and 4 ranks differ only by the order of their sums."""
    losses = {
        world_size: rank_pool(world_size).run(
            "tests.helpers.engine_jobs:train",
            {"variants": [{"dropout": 0.0, "max_steps": 30}], "steps": 20, "micro": 2},
        )[0][0]["losses"]
        for world_size in (1, 2, 4)
    }
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[4] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < 0.9 * losses[1][0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage, tolerance", [("fp32", 1e-4), *((stage, 0.03) for stage in ZERO)])
def test_adamw_is_given_the_clipped_gradient(rank_pool, world_size, stage, tolerance):
    """A tenth of the norm as the limit: a tenth of the gradient; a limit above the norm, or none, changes nothing.

    Adam's update hides a factor of the gradient, so its first moment is compared. The norm that is reported is the one
    before clipping.
    """
    dtype = torch.float32 if stage == "fp32" else torch.bfloat16
    wanted = reference_gradient(dtype=dtype)
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in wanted.values()))
    for limit, factor in ((0.1 * norm, 0.1), (2 * norm, 1.0), (0.0, 1.0)):
        # two parameter groups have one norm together
        arguments = {"micro": 2, "rates": {"shared": 0.1}, "gradient_clipping": limit, **ZERO.get(stage, {})}
        for found in rank_pool(world_size).run("tests.helpers.engine_jobs:first_update", arguments):
            assert found["norm"] == pytest.approx(norm, rel=tolerance)
            assert_close(found["gradient"], {name: factor * value for name, value in wanted.items()}, tolerance)
            for name, change in found["moved"].items():
                # AdamW's first update has the learning rate's size, whatever the gradient's
                assert change.abs().max() == pytest.approx(0.1 if name == "shared" else 0.02, rel=0.03), name


@pytest.mark.parametrize("world_size, micro", [(1, 3), (2, 2)])
def test_training_is_that_of_plain_torch(rank_pool, world_size, micro):
    """Schedule, clipping, weight decay, AdamW, and what stays frozen: against a plain loop over whole batches."""
    from transformers import get_linear_schedule_with_warmup

    steps, options = 9, {"weight_decay": 0.3, "gradient_clipping": 0.5, "warmup_steps": 3, "max_steps": 12}
    plain = ToyModel(dropout=0.0)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=options["weight_decay"])
    schedule = get_linear_schedule_with_warmup(optimizer, options["warmup_steps"], options["max_steps"])
    losses = []
    for step in range(steps):
        loss_sum, tokens = plain(**global_batch(step))
        (loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, options["gradient_clipping"])
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append((loss_sum / tokens).item())
    arguments = {"variants": [{"dropout": 0.0, **options}], "steps": steps, "micro": micro}
    for (found,) in rank_pool(world_size).run("tests.helpers.engine_jobs:train", arguments):
        assert found["losses"] == pytest.approx(losses, rel=1e-4)
        assert_close(found["weights"], dict(plain.named_parameters()), 1e-3)
        for name, parameter in ToyModel().named_parameters():
            assert torch.equal(found["weights"][name], parameter) != parameter.requires_grad, name


@pytest.mark.parametrize("epsilon", ["corrected", "uncorrected"])
def test_the_epsilon_of_adamw_is_the_one_that_is_set(rank_pool, epsilon):
    """Gradients clipped to epsilon's size, where its place decides the update by a factor."""
    steps, options = 6, {"gradient_clipping": 1e-7, "warmup_steps": 0, "max_steps": 100, "adam_epsilon": epsilon}
    plain = ToyModel(dropout=0.0).double()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    for step in range(steps):
        loss_sum, tokens = plain(**global_batch(step))
        (loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, options["gradient_clipping"])
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (100 - step) / 100
            group["eps"] = 1e-8 / (math.sqrt(1 - 0.999 ** (step + 1)) if epsilon == "uncorrected" else 1.0)
        optimizer.step(), optimizer.zero_grad()
    arguments = {"variants": [{"dropout": 0.0, **options}], "steps": steps, "micro": 3}
    (found,) = rank_pool(1).run("tests.helpers.engine_jobs:train", arguments)[0]
    start = dict(ToyModel().named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            moved, wanted = found["weights"][name] - start[name], parameter - start[name]
            assert (moved - wanted).abs().max() <= 0.01 * wanted.abs().max(), name


@pytest.mark.parametrize("stage", ZERO)
def test_masters_start_with_the_exact_weights(rank_pool, stage):
    """Not with those that were rounded to bf16, which the forward pass uses."""
    for found in rank_pool(2).run("tests.helpers.engine_jobs:at_the_start", ZERO[stage]):
        for name, parameter in ToyModel().named_parameters():
            assert torch.equal(found["weights"][name], parameter.bfloat16().float()), name
            if parameter.requires_grad:
                assert torch.equal(found["masters"][name], parameter), name


@pytest.mark.parametrize(
    "fault, stage",
    [("loss", "zero2"), *(("gradient", stage) for stage in ("fp32", "zero1", "zero2", "offload", "zero3_small"))],
)
def test_a_nan_stops_the_run(rank_pool, tmp_path, fault, stage):
    """On every rank, with the step, tasks and ids. The last checkpoint stays as it was, and so do the weights, except
    under ZeRO-1 and 2 in bf16, which do not wait for the device."""
    results = rank_pool(2).run(
        "tests.helpers.engine_jobs:non_finite", {"fault": fault, "folder": str(tmp_path), **ZERO.get(stage, {})}
    )
    for result in results:
        assert result["step"] == 3
        assert result["unchanged"] or stage in ("zero1", "zero2")
        assert result["message"].startswith("step 3: ")
        assert (
            "tasks task0, task1" in result["message"] and "2-0-0" in result["message"] and "2-1-3" in result["message"]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_step_waits_for_nothing_on_the_device(rank_pool, tmp_path, stage):
    """Within a step of ZeRO-1 or 2 in bf16 the host reads no number (norm, clipping and overflow check included)."""
    base = str(save_tiny_t5(tmp_path / "base", vocabulary=64))
    for found in rank_pool(2).run("tests.helpers.engine_jobs:waits_of_a_step", {"base": base, **ZERO[stage]}):
        assert found["step"] == []
        # the ear hears: a number that is read afterwards is noticed
        assert found["after"]


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_no_step_waits_for_all_of_the_device(rank_pool, stage):
    """DeepSpeed's throughput timer would from the third step on, twice for each pass: fails if it is left on."""
    for asked in rank_pool(2).run("tests.helpers.engine_jobs:synchronizations", {"steps": 5, **ZERO[stage]}):
        assert [step for step in asked if step >= 3] == []


@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero3_small"])
def test_ranks_may_evaluate_different_numbers_of_batches(rank_pool, stage):
    first, second = rank_pool(2).run("tests.helpers.engine_jobs:evaluate_unevenly", ZERO[stage], timeout=60)
    assert first == second
    # ZeRO-3 keeps small weights whole, and still does after an evaluation
    assert all(first["whole"]) and bool(first["whole"]) == (stage == "zero3")


def test_schedule_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 20)
    for step in range(22):
        assert learning_rate_factor(step, 5, 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_a_model_may_give_parameters_their_own_rate():
    model = ToyModel()
    model.learning_rates = lambda default: {"shared": 10 * default}
    groups = build_optimizer(model, settings(learning_rate=0.5).train, fused=False).param_groups
    rates = {group["peak_lr"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert rates == {0.5: 7 * 10 + 7 + 10 * 7 + 10, 5.0: 49}
    model.learning_rates = lambda default: {"embedding.weight": 1.0}
    with pytest.raises(KeyError, match="embedding.weight"):
        build_optimizer(model, settings().train, fused=False)


def test_dropout_seeds_differ():
    seeds = {dropout_seed(*key) for key in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, 0, 0, 0)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(3, 4, 5, 6) == dropout_seed(3, 4, 5, 6)


def test_each_forward_pass_has_a_dropout_seed_of_its_own(rank_pool):
    """That of its step, rank and micro-batch."""
    results = rank_pool(2).run("tests.helpers.engine_jobs:seeds_of_passes", {"steps": 2, "micro": 2, "seed": 9})
    for rank, seeds in enumerate(results):
        assert seeds == [dropout_seed(9, step, rank, index) for step in range(2) for index in range(2)]


def test_collectives(rank_pool):
    for rank, result in enumerate(rank_pool(3).run("tests.helpers.engine_jobs:collectives")):
        assert result["any"] is True and result["all"] is False and result["max"] == 6
        assert result["sums"] == [3.0, 4.5]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["broadcast"] == "from 0" and result["main"] == 10, rank
        assert result["mistake"] == "no such file; look elsewhere"


def test_a_hyperdecoder_under_zero_2_and_3(rank_pool, tmp_path):
    """Trains alike, decodes uneven batches between steps, and repeats a step bit for bit after loading a checkpoint."""
    base = save_tiny_t5(tmp_path / "base", vocabulary=64)
    small = {"dim": 5}
    method = {"name": "hyperdecoder", "encoder": small, "decoder": small, "hypernet": {"bottleneck": 6}}
    first, second = rank_pool(2).run(
        "tests.helpers.engine_jobs:adapted_model",
        {
            "base": str(base),
            "folder": str(tmp_path),
            "methods": [method],
            "variants": [ZERO["zero2"], ZERO["zero3_small"]],
        },
    )
    for here, there in zip(first, second, strict=True):
        assert here["losses"] == there["losses"] and here["again"] == here["losses"][-1]
        assert all(torch.equal(here["masters"][name], there["masters"][name]) for name in here["masters"])
        assert here["losses"] == pytest.approx(first[0]["losses"], rel=0.01)


@pytest.mark.skipif(not availability("cpp").usable, reason="no C++ kernels here")
@pytest.mark.parametrize("stage, tolerance", [("fp32", 1e-4), ("zero2", 0.03), ("zero3_small", 0.03)])
def test_compiled_adapters_have_the_gradients_of_plain_ones(rank_pool, tmp_path, stage, tolerance):
    """On two ranks: `method.backend` cpp against torch, heads shared by the layers (ZeRO-2) and not (ZeRO-3)."""
    base = save_tiny_t5(tmp_path / "base", vocabulary=64)
    small = {"dim": 5}
    methods = [
        {"name": "hyperdecoder", "encoder": small, "decoder": small, "hypernet": {"bottleneck": 6}, "backend": backend}
        for backend in ("cpp", "torch")
    ]
    arguments = {"base": str(base), "methods": methods, "variant": ZERO.get(stage, {})}
    for compiled, plain in rank_pool(2).run("tests.helpers.engine_jobs:adapted_gradients", arguments):
        assert compiled["backends"] == {"cpp"} and plain["backends"] == {"torch"}
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5 if stage == "fp32" else 2e-3)
        assert compiled["gradients"].keys() == plain["gradients"].keys()
        norm = torch.cat([value.flatten() for value in plain["gradients"].values()]).norm()
        for name, value in plain["gradients"].items():
            assert (compiled["gradients"][name] - value).norm() <= tolerance * max(value.norm(), 1e-3 * norm), name
