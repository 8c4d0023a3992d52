"""The package alone, as `pip install .` leaves it: no test tools, no extras. The main commands run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import HUB, ROOT, T5_TOKENIZER, needs_real_text

pytestmark = [pytest.mark.slow, needs_real_text]
QUICK = ["train.warmup_steps=1", "train.max_steps=2", "eval.every=2", "eval.limit=8", "eval.test_limit=8"]
COMMANDS = {
    "quick start": ["train", "--config", "configs/quickstart.yaml", *QUICK],
    # a base whose tokenizer is T5's own file: transformers converts it with libraries of its own
    "GLUE": [
        "train", "--config", "configs/glue_base.yaml", *QUICK, "run.name=glue", "data.tasks=[rte]", f"data.root={HUB}",
        f"model.tokenizer={T5_TOKENIZER}", "model.name=t5-v1_1-small", "train.global_batch_size=4", "train.dtype=fp32",
        "deepspeed=ds_configs/zero2_fp32.json",
    ],
    "plan": ["plan", "--config", "configs/glue_large.yaml", "--gpus", "8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `hdscale` command of a new environment, in which nothing else was installed."""
    folder = tmp_path_factory.mktemp("bare")
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    if subprocess.run([*pip, "filelock"], capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    # a copy: building leaves files in the folder that is built
    source = folder / "source"
    for name in ("hdscale", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "venv" / "bin" / "hdscale"


@pytest.mark.parametrize("what", COMMANDS)
def test_main_commands_run(installed: Path, tmp_path: Path, what: str) -> None:
    """Fails if anything that they import is not declared in pyproject.toml, or a file of the package is left out."""
    for name in ("configs", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "HDSCALE_CACHE": str(tmp_path / "cache")}
    environ["PATH"] = f"{installed.parent}{os.pathsep}{environ['PATH']}"
    done = subprocess.run([str(installed), *COMMANDS[what]], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
