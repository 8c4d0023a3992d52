"""What T5-base launches, waits for and keeps on a GPU, against the bounds, and the faults that these must catch."""

import pytest

from tests.simulated_gpu.bounds import LENGTHS, check_attention, check_launches, check_lengths, check_waits

pytestmark = pytest.mark.cuda


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
