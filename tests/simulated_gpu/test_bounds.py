"""What T5 launches, waits for and keeps on a GPU. All of it is the same at every run: torch decides it, not a clock."""

import pytest

pytestmark = pytest.mark.cuda

LAUNCHES = {
    # (size, method): launches of a pass (forward and backward) and of a decoded token, measured
    ("t5-v1_1-base", "hyperdecoder"): (1273, 314),
    ("t5-v1_1-base", "adapter"): (1202, 290),
    ("t5-v1_1-base", "lora"): (1826, 434),
    ("t5-v1_1-base", "full_finetuning"): (1542, 278),
    ("t5-v1_1-large", "hyperdecoder"): (2414, 614),
}
LESS = 0.95
"""Versions are pinned, so that any more is this project's doing; much less is a gain, and the bound is to follow it."""
LENGTHS = list(range(505, 513))
BYTES = {"t5-v1_1-base": 3.52e9, "t5-v1_1-large": 8.95e9}
"""Of a hyperdecoder's pass over 16 rows of 512 and 64 tokens."""


def check_launches(size, method, found):
    """Of a pass and of a token, all layers together, against the bounds above."""
    layers = {"launches": sum(found["layers"].values()), "launches of a token": found["layers"]["decoder"]}
    for (what, number), bound in zip(layers.items(), LAUNCHES[size, method], strict=True):
        count = found[what]["all"]
        told = f"{size}, {method}: {count} {what}, {count / number:.1f} per layer"
        print(told)
        assert count <= bound, f"{told}; the bound is {bound}"
        assert count >= LESS * bound, f"{told}: fewer than {bound}; lower the bound"


def check_attention(found):
    """Every attention in one fused kernel, none of which is cuDNN's; two softmax kernels are the loss's own."""
    for what, softmax in (("launches", 2), ("launches of a token", 0)):
        kinds = found[what]
        assert kinds["attention, fused"] and kinds["attention, softmax of its own"] == softmax, (what, kinds)


def check_lengths(size, found):
    """A source of any length takes the memory of the aligned one."""
    taken = found["bytes"].values()
    assert max(taken) <= 1.02 * min(taken), found["bytes"]
    assert max(taken) <= BYTES[size], f"{found['bytes']}: more than {BYTES[size]:.3e}"


def check_waits(found):
    """From the third step on, the host waits for one event: the numbers of the step before."""
    for number, waits in enumerate(found["steps"][2:], start=3):
        assert [where.split()[0] for where in waits] == ["cudaEventSynchronize"], (number, waits)
        assert list(waits.values()) == [1], (number, waits)


@pytest.fixture(scope="module")
def hyperdecoder(gpus):
    return gpus.measure("t5-v1_1-base", launches=True, decoded=[8, 24], steps=5, sources=LENGTHS)


def test_launches_of_a_hyperdecoder(hyperdecoder):
    check_launches("t5-v1_1-base", "hyperdecoder", hyperdecoder)
    assert hyperdecoder["launches"]["hdscale"] >= 9 * 12  # its own kernels, not PyTorch's


@pytest.mark.parametrize("method", ["adapter", "lora", "full_finetuning"])
def test_launches_of_other_methods(gpus, method):
    found = gpus.measure("t5-v1_1-base", launches=True, decoded=[8, 24], settings=[f"method.name={method}"])
    check_launches("t5-v1_1-base", method, found)
    check_attention(found)


def test_the_kernel_that_attention_chooses(gpus, hyperdecoder):
    """On an H100 and on an A100. Fails without `enable_cudnn_sdp(False)`, or with a mask that no fused kernel takes."""
    check_attention(hyperdecoder)
    check_attention(gpus.measure("t5-v1_1-base", capability="8.0", launches=True, decoded=[8, 24]))


def test_a_source_of_any_length_takes_the_same_memory(hyperdecoder):
    check_lengths("t5-v1_1-base", hyperdecoder)


def test_a_step_waits_for_one_event(hyperdecoder):
    check_waits(hyperdecoder)


# ---- tests of the tests ----------------------------------------------------------------------------------


def test_a_planted_wait(gpus):
    found = gpus.measure("t5-v1_1-base", steps=4, plant="tests.simulated_gpu.faults:a_wait_in_each_step")
    with pytest.raises(AssertionError, match="cudaStreamSynchronize at faults.py"):
        check_waits(found)


def test_a_planted_copy_of_the_mask(gpus):
    """Both the launches and the memory show it."""
    plant = "tests.simulated_gpu.faults:a_mask_copied_in_each_layer"
    found = gpus.measure("t5-v1_1-base", launches=True, decoded=[8, 24], sources=[505, 512], plant=plant)
    with pytest.raises(AssertionError, match="the bound is"):
        check_launches("t5-v1_1-base", "hyperdecoder", found)
    with pytest.raises(AssertionError, match="more than"):
        check_lengths("t5-v1_1-base", found)
