"""Files of studies for tests: a YAML, and finished runs with planted scaling laws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from hdscale.study.spec import Study, load_study
from hdscale.study.store import Store

AXES = {
    "size": {"model.name": ["tiny-1", "tiny-2", "tiny-4"]},
    "method": {"method.name": ["adapter", "hyperdecoder"]},
    "run.seed": [1, 2],
}
PARAMETERS = {"tiny-1": 3.1e5, "tiny-2": 1.1e6, "tiny-4": 4.3e6}


def write_study(folder: Path, **changes) -> Path:
    """A study's file; `changes` replace its keys (None: leaves one out)."""
    tree = {
        "name": "trial",
        "dir": str(folder / "runs"),
        "set": {"data": {"tasks": ["quickstart"]}, "train.max_steps": 4},
        "axes": AXES,
        **changes,
    }
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}, sort_keys=False))
    return path


def finish(store: Store, study: Study, alpha: float = 0.2) -> None:
    """Give every run results whose loss follows 2 (N / 1e6)^-alpha, with little noise."""
    random = np.random.default_rng(0)
    for index, run in enumerate(study.runs):
        size = PARAMETERS.get(run.config.model.name, 6e7)
        loss = 2 * (size / 1e6) ** -alpha * np.exp(0.01 * random.standard_normal())
        folder = store.run_folder(run.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("{}")
        lines = [
            {"kind": "train", "step": s, "loss": loss + 4 - s, "memory_gb": 0.5, "seconds": s} for s in range(1, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "results.json").write_text(
            json.dumps(
                {
                    "average": 100 - 20 * loss - (index % 2), "steps": 4, "seconds": 10.0 * size / 1e6, "samples": 512,
                    "tokens": 512 * 50, "trainable": 0.1 * size, "base_parameters": size, "trainable_percent": 10.0,
                    "provenance": {"device": "NVIDIA A100-SXM4-80GB", "world_size": 2},
                }
            )
        )  # fmt: skip


def finished_study(folder: Path) -> tuple[Study, Store]:
    """A study whose runs are all done."""
    study = load_study(write_study(folder))
    store = Store(study.folder)
    store.open(study)
    finish(store, study)
    return study, store
