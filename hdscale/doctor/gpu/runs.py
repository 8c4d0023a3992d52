"""Small training runs of the packaged quick start, each in processes of its own, on this machine."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdscale.doctor.gpu.lines import MOST_OUTPUT, Wrong
from hdscale.doctor.gpu.processes import end, ended, reason, start, tail
from hdscale.engine.deepspeed_config import DEFAULT
from hdscale.engine.ranks import free_port
from hdscale.files import write_text
from hdscale.runs.folder import LOG, METRICS

DETERMINISTIC = "train.deterministic"
POLL_SECONDS = 0.02
SETTINGS = (
    "data.tasks=[quickstart]", "data.max_source_length=64", "data.max_target_length=8", "train.warmup_steps=2",
    "train.log_every=1", "train.compile=off", "eval.every=0", "eval.select=last", "eval.test=false",
    "run.threads=2",
)  # fmt: skip
QUICK = ("model.name=quickstart", "method.decoder.dim=32", "method.hypernet.bottleneck=32")
SMALL = ("model.name=t5-v1_1-small", "model.tokenizer=quickstart")
"""A real size, with random weights: its heads are as long as those of large bases."""
STAGE_3 = {
    "stage": 3, "contiguous_gradients": True, "reduce_scatter": True, "overlap_comm": True,
    "reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2 with offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "ZeRO-3": STAGE_3,
}


@dataclass
class TrainingRun:
    """A run in progress.

    Attributes:
        folder: of the run. processes: its ranks. log: their output.
    """

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    log: Path

    def alive(self) -> bool:
        """Whether all of its ranks are running: one that has failed leaves the others waiting for it."""
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            end(process)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            Wrong: if it fails.
        """
        try:
            while any(process.poll() is None for process in self.processes):
                if any(process.poll() for process in self.processes):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            codes = [process.poll() for process in self.processes]
            self.kill()
        if bad := [code for code in codes if code]:
            raise Wrong(f"the run ended with {ended(bad[0])}: {reason(self.log)}", tail(self.log, MOST_OUTPUT))

    def losses(self) -> dict[int, tuple[float, float]]:
        """{step: loss and norm of the gradient}; of a step that was taken twice, the second time."""
        path = self.folder / METRICS
        found = {}
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the run was killed while it wrote this line
            if line["kind"] == "train":
                found[int(line["step"])] = (line["loss"], line["grad_norm"])
        return found

    def export(self) -> bytes:
        """The trained weights, as they were exported at the end."""
        return (self.folder / "adapter" / "hdscale_adapter.safetensors").read_bytes()

    def log_lines(self, word: str) -> list[str]:
        """The lines of the run's log that contain a word, from the word on."""
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        return [line[line.index(word) :] for line in lines if word in line]


def train(work: Path, name: str, ranks: int, *settings: str, zero: str = "ZeRO-2", dtype: str = "bf16") -> TrainingRun:
    """Start a run; the same name again resumes it.

    Args:
        work: folder of the examination. ranks: processes, each on a GPU of its own where there are GPUs.
        settings: over `SETTINGS`. zero: one of `KINDS`. dtype: bf16 or fp32.
    """
    config, deepspeed = work / "run.yaml", work / f"{zero.replace(' ', '_')}_{dtype}.json"
    write_text(config, "run:\n  seed: 1\n")
    write_text(deepspeed, json.dumps(deepspeed_config(KINDS[zero], dtype)))
    command = [
        sys.executable, "-P", "-m", "hdscale", "train", "--config", str(config), f"run.dir={work / 'runs'}",
        f"run.name={name}", f"deepspeed={deepspeed}", f"train.dtype={dtype}", *SETTINGS, *settings,
    ]  # fmt: skip
    log, port = work / f"{name}.log", str(free_port())
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(start(command, log, None, False, **(place if ranks > 1 else {})))
    return TrainingRun(work / "runs" / name, processes, log)


def deepspeed_config(zero: dict[str, Any], dtype: str) -> dict[str, Any]:
    """hdscale's own DeepSpeed configuration with other keys of its section on ZeRO."""
    config = copy.deepcopy(DEFAULT)
    config["bf16"] = {"enabled": dtype == "bf16"}
    if zero["stage"] == 3:
        config["zero_optimization"] = dict(zero)
    else:
        config["zero_optimization"] |= zero
    return config


def shareable() -> bool:
    """Whether several processes may compute on one GPU at a time."""
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return (os.cpu_count() or 1) >= 4
    return all(line.strip() == "Default" for line in done.stdout.splitlines()) and (os.cpu_count() or 1) >= 4


def equal(first: TrainingRun, second: TrainingRun) -> str | None:
    """How two runs of the same steps differ; None if losses, gradients' norms and exported weights have the same bits.

    Raises:
        Wrong: if they have not taken the same steps.
    """
    one, other = first.losses(), second.losses()
    if one.keys() != other.keys() or not one:
        raise Wrong(f"steps {sorted(one)} against {sorted(other)}")
    if unlike := [step for step in sorted(one) if one[step] != other[step]]:
        worst = max(abs(one[step][0] - other[step][0]) for step in unlike)
        return f"they differ from step {unlike[0]} of {max(one)} on, losses by up to {worst:.1e}"
    if first.export() != second.export():
        return "losses and gradients' norms are equal, the trained weights are not"
    return None


def finish_all(runs: Sequence[TrainingRun]) -> None:
    """Wait for the end of runs; whatever happens, none is left."""
    try:
        for run in runs:
            run.finish()
    finally:
        for run in runs:
            run.kill()
