"""Configurations: every YAML that ships is read and its model built; inheritance and order."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdscale.config import RELEASE, load_config
from hdscale.engine.deepspeed_config import resolve_deepspeed_config
from hdscale.errors import UserError
from hdscale.resolve import resolve_model
from hdscale.settings import flatten
from tests.helpers.places import ROOT

CONFIGS = ROOT / "configs"
# hub checkpoints cannot be reached here: the built-in size of the same architecture stands in for each
BUILT_IN = {
    "google/t5-base-lm-adapt": "t5-v1_1-base",
    "google/t5-large-lm-adapt": "t5-v1_1-large",
    "google/t5-xl-lm-adapt": "t5-v1_1-xl",
    "google/t5-xxl-lm-adapt": "t5-v1_1-xxl",
    "google-t5/t5-base": "t5-base",
}
RUNS = sorted(path for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_shipped_configuration_is_read_and_its_model_built(path: Path) -> None:
    from hdscale.modeling import build_model

    config = load_config(path)
    config.model.name = BUILT_IN.get(config.model.name, config.model.name)
    model = build_model(resolve_model(config), device="meta")
    assert model.trainable_names()
    assert config.run.name == path.stem, "a run is called after its file"


def test_command_line_over_file_over_base_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {max_steps: 10, warmup_steps: 3}\nrun: {name: base}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\ntrain: {max_steps: 20}\n")
    config = load_config(tmp_path / "own.yaml", ["train.learning_rate=0.5"])
    assert (config.train.max_steps, config.train.warmup_steps, config.train.learning_rate) == (20, 3, 0.5)
    assert config.run.name == "base" and config.train.global_batch_size == 128


def test_bases_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_nested_mappings_are_merged_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: {encoder: {dim: 3}}\n")
    config = load_config(tmp_path / "a.yaml")
    assert config.method.encoder.dim == 3 and config.method.encoder.adapter == "manual"


def test_the_release_s_side_comes_under_other_settings(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("release: true\ntrain: {label_smoothing: 0.0}\n")
    config = load_config(path, ["eval.select=average"])
    assert (config.train.loss_reduction, config.train.adam_epsilon, config.data.stsb_step) == (
        "sum",
        "uncorrected",
        0.1,
    )
    assert (config.train.label_smoothing, config.eval.select) == (0.0, "average")
    assert load_config(None, ["release=true"]).eval.count_start_token
    assert load_config(path, ["release=false"]).train.loss_reduction == "mean"
    assert load_config(None, []).train.adam_epsilon == "corrected"


def test_the_release_s_side_comes_over_the_file_below(tmp_path):
    """configs/glue_large.yaml, and so every table of the paper, has a DeepSpeed file of its own."""
    path = tmp_path / "c.yaml"
    path.write_text(f"base: {ROOT / 'configs' / 'glue_large.yaml'}\nrelease: true\n")
    table = ROOT / "configs" / "paper" / "table1_hyperdecoder.yaml"
    for config in (load_config(path), load_config(table, ["train.max_steps=9", "release=true"])):
        assert (config.train.dtype, config.deepspeed) == ("fp32", "ds_configs/zero2_fp32.json")
        assert resolve_deepspeed_config(config.deepspeed, config.train, 1)
    kept = load_config(table, ["train.label_smoothing=0.2", "release=true"])
    assert (kept.train.label_smoothing, kept.eval.mrqa_empty) == (0.2, False)
    assert load_config(path, ["release=false"]).deepspeed == "ds_configs/zero2_bf16.json"


def test_what_the_release_sets_is_what_the_page_says():
    page = (ROOT / "docs" / "differences.md").read_text()
    flat = flatten(RELEASE)
    for key, value in flat.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        assert f"`{key}={shown}`" in page, key
