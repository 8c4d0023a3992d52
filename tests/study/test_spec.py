"""A study's YAML: what it expands to, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import pytest

from hdscale.errors import UserError
from hdscale.study.spec import load_study
from tests.helpers.places import ROOT
from tests.helpers.study_files import AXES, write_study

STUDIES = sorted(ROOT.glob("configs/studies/*.yaml"))


def test_the_grid_is_every_combination_under_a_name_of_its_own(tmp_path):
    study = load_study(write_study(tmp_path))
    assert len(study.runs) == 12
    assert [run.name for run in study.runs[:3]] == [
        "tiny-1_adapter_seed1",
        "tiny-1_adapter_seed2",
        "tiny-1_hyperdecoder_seed1",
    ]
    last = study.runs[-1]
    assert (last.config.model.name, last.config.method.name, last.config.run.seed) == ("tiny-4", "hyperdecoder", 2)
    assert last.config.train.max_steps == 4
    assert (last.config.run.name, last.config.run.dir) == (last.name, str(tmp_path / "runs" / "trial"))
    assert last.point == {"size": "tiny-4", "method": "hyperdecoder", "run.seed": "seed2"}


def test_keys_of_a_zipped_axis_move_together(tmp_path):
    axes = {"size": {"model.name": ["tiny-1", "tiny-2"], "train.learning_rate": [1e-3, 3e-4]}}
    runs = load_study(write_study(tmp_path, axes=axes)).runs
    assert [(run.config.model.name, run.config.train.learning_rate) for run in runs] == [
        ("tiny-1", 1e-3),
        ("tiny-2", 3e-4),
    ]


def test_points_may_be_named(tmp_path):
    axes = {
        "budget": {
            "lean": {"method.encoder.dim": 8},
            "rich": {"method": {"encoder": {"dim": 64}, "decoder": {"dim": 32}}},
        }
    }
    runs = load_study(write_study(tmp_path, axes=axes)).runs
    assert [run.name for run in runs] == ["lean", "rich"]
    assert (runs[1].config.method.encoder.dim, runs[1].config.method.decoder.dim) == (64, 32)


def test_the_base_configuration_is_found_beside_the_study(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {warmup_steps: 7}\n")
    study = load_study(write_study(tmp_path, config="base.yaml"))
    assert all(run.config.train.warmup_steps == 7 for run in study.runs)


def test_the_release_s_side_can_be_the_base_s_or_an_axis(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {loss_reduction: mean}\nrelease: true\n")
    of_base = load_study(write_study(tmp_path, config="base.yaml")).runs[0].config.train
    assert (of_base.loss_reduction, of_base.label_smoothing) == ("mean", 0.1)
    runs = load_study(write_study(tmp_path, config="base.yaml", axes={"release": [False, True]})).runs
    assert [run.config.train.loss_reduction for run in runs] == ["mean", "sum"]
    assert [run.config.train.label_smoothing for run in runs] == [0.0, 0.1]


def test_combinations_can_be_left_out(tmp_path):
    study = load_study(write_study(tmp_path, exclude=[{"size": "tiny-4", "method": "adapter"}, {"run.seed": 2}]))
    assert [run.name for run in study.runs] == [
        "tiny-1_adapter_seed1", "tiny-1_hyperdecoder_seed1", "tiny-2_adapter_seed1", "tiny-2_hyperdecoder_seed1",
        "tiny-4_hyperdecoder_seed1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"axes": {"run.sed": [1]}}, r"axes.run.sed names no key; did you mean 'run.seed'"),
        ({"axes": {"size": {"model.nam": ["a"]}}}, r"axes.size.model.nam names no key; did you mean 'model.name'"),
        ({"axes": {**AXES, "again": {"run.seed": [3]}}}, r"axes.run.seed and axes.again clash: both set run.seed"),
        ({"axes": {"train.max_steps": [1, 2]}}, r"set and axes.train.max_steps clash"),
        ({"axes": {"run.name": ["a"]}}, r"sets run.name, which the study decides"),
        ({"axes": {"run.seed": []}}, r"axes.run.seed is empty, which leaves no run"),
        ({"axes": {}}, r"axes must name at least one axis"),
        ({"axes": None}, r"axes must name at least one axis"),
        ({"axes": {"run.seed": [1, 1]}}, r"has 'seed1' twice"),
        ({"axes": {"run.seed": 3}}, r"must be a list of values"),
        (
            {"axes": {"size": {"model.name": ["a", "b"], "run.seed": [1]}}},
            r"equally many values: model.name has 2, run.seed has 1",
        ),
        ({"axes": {"run.seed": ["one"]}}, r"axes.run.seed, point one"),
        ({"exclude": [{"run.seed": 1}, {"run.seed": 2}]}, r"the grid is empty"),
        ({"exclude": [{"siz": "tiny-1"}]}, r"exclude names the axis 'siz'; did you mean 'size'"),
        ({"exclude": [{"size": "tiny-3"}]}, r"exclude names size: tiny-3, which is not one of its points"),
        ({"limits": {"runs": 3}}, r"12 runs, and limits.runs is 3"),
        ({"limits": {"retry": 3}}, r"limits.retry'; did you mean 'retries'"),
        ({"limits": {"retries": "many"}}, r"must be a whole number"),
        ({"set": {"train.max_stepz": 3}}, r"set: unknown key 'train.max_stepz'; did you mean 'train.max_steps'"),
        ({"axis": {}}, r"unknown key 'axis'; did you mean 'axes'"),
        ({"config": "none.yaml"}, r"no configuration file"),
        ({"name": "../up"}, r"must be fit for a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        load_study(write_study(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no study file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("axes: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_study(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_expand(path):
    study = load_study(path)
    assert 1 < len(study.runs) <= study.limits.runs
    assert study.name == path.stem
