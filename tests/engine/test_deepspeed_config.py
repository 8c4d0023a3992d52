"""The DeepSpeed JSON: every shipped file is accepted, and what contradicts the configuration is refused by name."""

from __future__ import annotations

import json

import pytest

from hdscale.engine.deepspeed_config import DEFAULT, limit_buckets, read_deepspeed_config, resolve_deepspeed_config
from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError
from tests.helpers.places import ROOT

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def train(**values: object) -> TrainSettings:
    return TrainSettings(**{"global_batch_size": 32, "micro_batch_size": 4, **values})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_accepted(path):
    dtype = path.stem.rpartition("_")[2]
    config = limit_buckets(resolve_deepspeed_config(str(path), train(dtype=dtype), world_size=2), trainable=5001)
    assert config["zero_optimization"]["stage"] == int(path.stem[4])
    assert config["bf16"]["enabled"] == (dtype == "bf16")
    assert ("offload_optimizer" in config["zero_optimization"]) == ("offload" in path.stem)
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert config["gradient_clipping"] == 1.0 and config["managed_gradient_accumulation"] is False
    # buckets are allocated whole: none is larger than what there is to send
    assert config["zero_optimization"]["reduce_bucket_size"] == 5002


def test_timers_that_wait_for_the_device_are_off_unless_asked_for(tmp_path):
    """Fails without the entry: DeepSpeed's own default is on."""
    assert resolve_deepspeed_config(None, train(), 2)["timers"] == {"throughput": {"enabled": False}}
    file = tmp_path / "timed.json"
    file.write_text(json.dumps({**DEFAULT, "timers": {"throughput": {"enabled": True, "synchronized": False}}}))
    found = resolve_deepspeed_config(str(file), train(), 2)["timers"]
    assert found == {"throughput": {"enabled": True, "synchronized": False}}


def test_default_is_the_shipped_zero2():
    assert json.loads((SHIPPED[0].parent / "zero2_bf16.json").read_text()) == DEFAULT
    assert json.loads((SHIPPED[0].parent / "zero2_fp32.json").read_text()) == read_deepspeed_config(None, "fp32")[0]


def test_a_path_is_found_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config("ds_configs/zero3_bf16.json")[0]["zero_optimization"]["stage"] == 3


def test_equal_values_and_auto_are_no_contradiction(tmp_path):
    file = tmp_path / "same.json"
    optimizer = {"type": "AdamW", "params": {"lr": 0.0003, "weight_decay": 0.0, "betas": "auto"}}
    batch = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 4}
    file.write_text(json.dumps({**DEFAULT, **batch, "optimizer": optimizer, "gradient_clipping": 1}))
    config = resolve_deepspeed_config(str(file), train(), world_size=2)
    assert "optimizer" not in config and "train_batch_size" not in config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train_batch_size": 64}, ["train_batch_size=64", "train.global_batch_size=32"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu=8", "train.micro_batch_size=4"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps=2", "train.micro_batch_size"]),
        ({"gradient_clipping": 5.0}, ["gradient_clipping=5.0", "train.gradient_clipping=1.0"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            ["optimizer.params.lr=0.1", "train.learning_rate=0.0003"],
        ),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type=Lamb", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.warmup_steps"]),
        ({"fp16": {"enabled": True}}, ["fp16", "train.dtype=bf16"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled=false", "train.dtype=bf16"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype"]),
        ({"managed_gradient_accumulation": True}, ["managed_gradient_accumulation"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage=0"]),
        ({"zero_optimization": {"stage": 2, "reduce_scater": True}}, ["zero_optimization.reduce_scater"]),
        (
            {"zero_optimization": {"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}},
            ["reduce_scatter=false"],
        ),
        ({"optimizer": "AdamW"}, ["optimizer must be an object"]),
    ],
)  # fmt: skip
def test_contradictions_are_named(tmp_path, change, named):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**DEFAULT, **change}))
    with pytest.raises(UserError) as caught:
        resolve_deepspeed_config(str(file), train(), world_size=2)
    message = str(caught.value)
    assert "\n" not in message and "bad.json" in message
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"global_batch_size": 30}, "cannot be divided evenly among 4 ranks; use for example 28 or 32"),
        ({"global_batch_size": 3}, "use for example 4 or 8"),
    ],
)
def test_impossible_settings(settings, said):
    with pytest.raises(UserError, match=said):
        resolve_deepspeed_config(None, train(**settings), world_size=4)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        read_deepspeed_config(str(tmp_path / "nowhere.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_deepspeed_config(str(broken))
    broken.write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object, not list"):
        read_deepspeed_config(str(broken))
