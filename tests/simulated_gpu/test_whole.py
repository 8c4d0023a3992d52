"""hdscale on simulated GPUs that compute: doctor, the engine's and the checkpoint's tests, the quick start.

The host computes torch's operators, and the project's kernels run in the emulator, launched by the real library.
"""

import json

import pytest

from tests.helpers.places import ROOT
from tests.simulated_gpu.bounds import check_attention, check_launches, check_lengths, check_waits

pytestmark = [pytest.mark.cuda, pytest.mark.slow]

STEPS = 3
SHORT = [
    f"train.max_steps={STEPS}", "train.log_every=1", "train.global_batch_size=16", "eval.every=0", "eval.select=last",
    "eval.limit=8", "eval.test_limit=8", "train.compile=off",
]  # fmt: skip
STAGES = ["zero1", "zero2", "zero2_offload", "zero3"]


def finished(done):
    """A run's output; nothing may have gone wrong on the simulated GPUs meanwhile."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulated GPU, process" not in done.stdout + done.stderr, done.stderr
    return done.stdout


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_doctor_finds_right_kernels(gpus):
    """It compares their results with float64: here they are computed. Fails if nothing computes the kernels."""
    found = json.loads(finished(gpus.run(("--compute",), "-m", "hdscale", "doctor", "--json")))
    assert found["active"]["cuda"] == "cuda"


# but for those that compare with the C++ kernels
ENGINE = {"test_checkpoint.py": "", "test_training.py": "not compiled_adapters"}


@pytest.mark.parametrize("file", ENGINE)
def test_the_engine(gpus, file):
    """Its own tests, a GPU a rank."""
    done = gpus.run(
        ("--compute", "--devices", "4"), "-m", "pytest", "-q", "-m", "not slow", "-k", ENGINE[file],
        ROOT / "tests" / "engine" / file, HDSCALE_TEST_DEVICE="cuda",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def on_the_host(gpus, tmp_path_factory):
    """Losses of the same steps on a CPU."""
    folder = tmp_path_factory.mktemp("host")
    settings = [*SHORT, f"run.dir={folder}", "run.name=host", "eval.test=false"]
    done = gpus.without_gpus(
        ROOT / "hdscale" / "train.py", "--config", "configs/quickstart.yaml", *settings, DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "host")


def quick_start(gpus, devices, folder, *settings):
    """By the `deepspeed` launcher, as the README has it; the losses of its steps."""
    launch = [gpus.python.parent / "deepspeed", "--num_gpus", devices, "hdscale/train.py"]
    arguments = ["--config", "configs/quickstart.yaml", *SHORT, f"run.dir={folder}", "run.name=gpu", *settings]
    out = finished(gpus.run(("--compute", "--devices", str(devices)), *launch, *arguments))
    assert f"{devices} rank" in out and "on cuda" in out, out
    assert (folder / "gpu" / "results.json").exists()
    return losses(folder / "gpu")


def test_the_quick_start_on_one_gpu(gpus, on_the_host, tmp_path):
    assert quick_start(gpus, 1, tmp_path) == pytest.approx(on_the_host, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_quick_start_on_two_gpus(gpus, on_the_host, tmp_path, stage):
    """In bf16, with the project's own kernels; the losses are the host's but for rounding."""
    found = quick_start(gpus, 2, tmp_path, "train.dtype=bf16", f"deepspeed=ds_configs/{stage}_bf16.json")
    assert found == pytest.approx(on_the_host, rel=0.02)


def test_bounds_of_t5_large(gpus):
    """The same as at base, in the tests that run before each merge."""
    found = gpus.measure("t5-v1_1-large", launches=True, decoded=[8, 24], steps=4, sources=[505, 512])
    check_launches("t5-v1_1-large", "hyperdecoder", found)
    check_attention(found)
    check_lengths("t5-v1_1-large", found)
    check_waits(found)
