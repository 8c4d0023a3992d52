"""ZeRO-3 gathers weights by collectives in the forward pass: every rank must start the same ones."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tiny import save_tiny_t5

ZERO2 = {"deepspeed": None, "dtype": "fp32"}
ZERO3 = {"deepspeed": "tests/helpers/zero3_no_prefetch_fp32.json", "dtype": "fp32"}
"""Every layer's weights are gathered when it runs: with prefetching, one large gather may hide ranks' differences."""
SIDE = {"dim": 5}
METHODS = {
    "hyperdecoder": {"name": "hyperdecoder", "encoder": SIDE, "decoder": SIDE, "hypernet": {"bottleneck": 6}},
    "lora": {"name": "lora", "lora": {"rank": 2}},
    "hyperformer": {"name": "hyperformer", "hyperformer": {"dim": 3}},
    "full_finetuning": {"name": "full_finetuning"},
}


@pytest.mark.parametrize(
    "world_size, name",
    [(2, "hyperdecoder"), (3, "hyperdecoder"), (2, "lora"), (2, "hyperformer"), (2, "full_finetuning")],
)  # fmt: skip
def test_ranks_with_rows_of_unlike_lengths(rank_pool, tmp_path, world_size, name):
    """Twenty steps and more under ZeRO-2 and 3: one loss, one list of collectives, and the same tokens.

    Of each pass one rank's cross-attention projects its source and another's does not (its own lengths decide), so
    a layer that gathers only the weights that it uses would have the ranks gather different ones.
    """
    base = save_tiny_t5(tmp_path / "base", vocabulary=64, d_kv=40)
    steps = 20 if name == "hyperdecoder" else 4
    arguments = {
        "base": str(base), "method": METHODS[name], "variants": [ZERO2, ZERO3], "steps": steps
    }  # fmt: skip
    results = rank_pool(world_size).run("tests.helpers.zero3_jobs:train", arguments)
    for rank, (zero2, zero3) in enumerate(results):
        assert zero3["collectives"] == results[0][1]["collectives"] and len(zero3["collectives"]) > 20
        # the first step too, when DeepSpeed does not know yet what a layer uses, and would gather weight by weight
        assert zero3["first"] == results[0][1]["first"]
        if name in ("hyperdecoder", "lora"):
            assert len(zero3["first"]) < 2 * len(zero3["collectives"])
        assert zero3["losses"] == results[0][1]["losses"]
        assert zero3["losses"] == pytest.approx(zero2["losses"], rel=1e-4)
        for key, gradient in zero2["gradients"].items():
            assert (zero3["gradients"][key] - gradient).norm() <= 1e-6 * gradient.norm(), key
        assert zero2["ways"] == zero3["ways"]
        if name in ("hyperdecoder", "hyperformer"):
            assert zero3["ways"] == ["Projected", "Unprojected"]
        assert [one[:2] for one in zero3["decoded"]] == [
            (row, beams) for row in range(rank, 7, world_size) for beams in (1, 2)
        ]
        for key, master in zero3["masters"].items():
            assert torch.equal(master, results[0][1]["masters"][key])
