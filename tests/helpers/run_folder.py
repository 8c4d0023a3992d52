"""The folder of a finished run, without training."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from hdscale.config import load_config, to_dict
from hdscale.modeling.model import build_model
from hdscale.resolve import resolve_model
from tests.helpers.evaluation_jobs import make_tasks, write_rows

OVERRIDES = [
    "model.name=tiny-1",
    "method.encoder.dim=4",
    "method.decoder.dim=4",
    "method.hypernet.bottleneck=4",
    "train.dtype=fp32",
    "data.max_source_length=48",
    "data.max_target_length=6",
    "data.chunk_overlap=8",
    "run.seed=5",
]


def make_run_folder(folder: Path, data: Path) -> Path:
    """A run's folder as training leaves it: configuration and export (the base is the random one of the run's seed).

    Args:
        folder: of the run, made here. data: an existing folder for its rows and tokens.
    """
    _, settings = make_tasks(data)
    config = load_config(None, [*OVERRIDES, f"data.mrqa_root={settings.mrqa_root}", f"data.cache={data}/cache"])
    config.data.custom = {
        "pairs": {
            "kind": "label",
            "labels": ["no", "yes"],
            "source": "pairs one: {one} two: {two}",
            "target": "{label}",
            "files": {"train": str(data / "pairs.jsonl"), "test": str(data / "pairs.jsonl")},
            "may_be_empty": ["two"],
        }
    }
    write_rows(
        data / "pairs.jsonl",
        [{"one": f"cat {n}", "two": "dog", "label": ["no", "yes"][n % 2]} for n in range(7)],
    )
    config.data.tasks = ["pairs", "squad"]
    config.run.dir, config.run.name = str(folder.parent), folder.name
    model = build_model(resolve_model(config), torch.float32, seed=config.run.seed)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in model.trainable_names():
            model.get_parameter(name).normal_(std=0.3)
    folder.mkdir()
    model.save_pretrained(str(folder / "adapter"))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return folder
