"""The losses of the first steps of `configs/quickstart.yaml`, and the record of them in tests/assets/losses/.

python -m tests.helpers.pin_losses          writes the record anew, after a change that is meant to change the losses
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.helpers.places import ROOT, TESTS
from tests.helpers.ranks import RankPool
from tests.helpers.train_jobs import losses

RECORD = TESTS / "assets" / "losses" / "quickstart.json"
RANKS = 2
OVERRIDES = [
    "train.max_steps=60",
    "train.log_every=1",
    "train.checkpoint_every=1000",
    "model.dropout=0.1",
    "eval.every=0",
    "eval.select=last",
    "eval.test=false",
    "run.name=pinned",
]


def quickstart_losses(pool: RankPool, folder: Path) -> dict[str, Any]:
    """Train in an empty folder; the losses of all steps, and what their last bits depend on."""
    places = [f"run.dir={folder}", f"data.cache={folder}/cache"]
    arguments = {"config": str(ROOT / "configs/quickstart.yaml"), "overrides": [*OVERRIDES, *places]}
    codes = [result["code"] for result in pool(RANKS).run("tests.helpers.train_jobs:run", arguments)]
    assert codes == [0] * RANKS, codes
    run = folder / "pinned"
    provenance = json.loads((run / "results.json").read_text())["provenance"]
    return {
        "computed_by": {
            "torch": provenance["versions"]["torch"],
            "cpu": provenance["device"],
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": provenance["threads"],
            "ranks": provenance["world_size"],
            "backend": json.loads((run / "settled.json").read_text()).get("backend"),
        },
        "overrides": OVERRIDES,
        "losses": list(losses(run).values()),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = quickstart_losses(RankPool(), Path(folder))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{RECORD.relative_to(ROOT)}: {len(record['losses'])} losses, the last {record['losses'][-1]:.6f}")


if __name__ == "__main__":
    main()
