"""A user's mistakes: one clear line, exit code 2, nothing loaded, nothing overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hdscale.commands import cli
from tests.helpers.places import HUB, T5_TOKENIZER, needs_real_text
from tests.helpers.tiny import save_tiny_t5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `hdscale train` with overrides and returns its one line on stderr; fails if anything else happened."""
    # nothing expensive may be reached
    monkeypatch.setattr("hdscale.train.build_model", lambda *args, **kwargs: pytest.fail("the model was built"))

    def run(*overrides: str, config: str = "configs/glue_large.yaml") -> str:
        argv = [
            "train", "--config", config,
            f"model.name={base}", f"model.tokenizer={T5_TOKENIZER}", f"data.root={HUB}",
            f"data.cache={tmp_path / 'cache'}",
            f"run.dir={tmp_path / 'runs'}", *overrides,
        ]  # fmt: skip
        code = cli.main(argv)
        captured = capsys.readouterr()
        assert code == 2, captured
        lines = [line for line in captured.err.splitlines() if line.startswith("hdscale: error:")]
        assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
        return lines[0]

    return run


CASES = [
    (["train.max_stps=5"], ["train.max_stps", "did you mean 'train.max_steps'"]),
    (["trian.max_steps=5"], ["trian", "did you mean 'train'"]),
    (["train.max_steps=many"], ["train.max_steps", "Integer"]),
    (["just-a-word"], ["just-a-word", "key=value"]),
    (["data.tasks=[cola,sst3]"], ["sst3", "did you mean 'sst2'"]),
    (["method.name=hyperdecodr"], ["did you mean 'hyperdecoder'"]),
    (["method.decoder.adapter=generatd"], ["method.decoder.adapter", "did you mean 'generated'"]),
    (["model.name=t5-v1_1-lage"], ["did you mean 't5-v1_1-large'"]),
    (["model.name=./no/such/folder"], ["model.name", "no/such/folder"]),
    (["deepspeed=ds_configs/none.json"], ["ds_configs/none.json"]),
    (["eval.select=bleu"], ["eval.select=bleu", "average"]),
    (["train.global_batch_size=0"], ["train.global_batch_size"]),
    (["data.root=/no/such/mirror"], ["/no/such/mirror"]),
    (["method.encoder.dim=0"], ["method.encoder.dim"]),
    (["data.tasks=[]"], ["data.tasks"]),
    (["method.backend=cuda", "train.dtype=fp32"], ["method.backend=cuda computes in bf16 only", "method.backend=auto"]),
]


@needs_real_text
@pytest.mark.parametrize(("overrides", "said"), CASES, ids=[case[0][0] for case in CASES])
def test_configuration(refused, overrides, said) -> None:
    line = refused(*overrides)
    assert all(words in line for words in said), line


def test_missing_configuration_file(refused) -> None:
    assert "configs/glue_lage.yaml" in refused(config="configs/glue_lage.yaml")


def test_unknown_key_in_a_file_names_the_file(refused, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text("train:\n  learning_rat: 1\n")
    line = refused(config=str(tmp_path / "bad.yaml"))
    assert "bad.yaml" in line and "did you mean 'train.learning_rate'" in line


@needs_real_text
def test_deepspeed_json_that_contradicts(refused, tmp_path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_batch_size": 7, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    )
    line = refused(f"deepspeed={tmp_path / 'ds.json'}")
    assert "train_batch_size=7" in line and "train.global_batch_size=128" in line


@needs_real_text
def test_mirror_that_lacks_a_split(refused, tmp_path) -> None:
    mirror = tmp_path / "mirror" / "nyu-mll" / "glue" / "cola"
    mirror.mkdir(parents=True)
    (mirror / "train-00000-of-00001.parquet").symlink_to(
        HUB / "nyu-mll" / "glue" / "cola" / "train-00000-of-00001.parquet"
    )
    line = refused("data.tasks=[cola]", f"data.root={tmp_path / 'mirror'}")
    assert "validation" in line and str(mirror) in line


@needs_real_text
def test_run_folder_without_write_permission(refused, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "run.dir" in refused(f"run.dir={tmp_path / 'file'}")


@needs_real_text
def test_run_in_use(refused, tmp_path) -> None:
    import fcntl

    folder = tmp_path / "runs" / "busy"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused("run.name=busy")
    assert os.listdir(folder) == [".lock"]


def test_help_answers(capsys) -> None:
    for verb in ("train", "params", "convert"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, "--help"])
        assert stopped.value.code == 0
        assert "usage: hdscale" in capsys.readouterr().out
