"""A study's YAML: a base configuration and axes, expanded to named runs.

name: sizes                      # default: the file's stem; its folder is dir/name
config: ../glue_large.yaml       # base configuration, relative to this file
set: {train.max_steps: 2000}     # settings of every run
axes:
  train.learning_rate: [1e-4, 3e-4]            # a key and its values
  size: {model.name: [a, b], data.cache: [c, d]}   # zipped: the keys change together
  method:                                      # zipped, its points named
    plain: {method.name: adapter, method.encoder.dim: 230}
    ours: {method.name: hyperdecoder, method.encoder.dim: 64}
exclude: [{size: b, method: plain}]            # combinations to leave out, by names of points
limits: {runs: 50, retries: 2, minutes: 60}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdscale.cluster.records import LAUNCHES
from hdscale.cluster.sweep import grid
from hdscale.config import Config, all_keys, merge_layers, to_config, to_dict, yaml_layers
from hdscale.errors import UserError, nearest, one_line
from hdscale.settings import flatten

KEYS = ("name", "title", "dir", "config", "set", "axes", "exclude", "limits")
RESERVED = ("run.name", "run.dir")
FOLDERS = ("_study", "report", LAUNCHES)
"""Folders of a study beside those of its runs."""


@dataclass(frozen=True)
class Limits:
    """What a study may use.

    Attributes:
        runs: a grid of more runs is refused. retries: further attempts of a run that failed.
        minutes: a local run is stopped after this time, and counts as failed.
    """

    runs: int = 200
    retries: int = 1
    minutes: float | None = None


@dataclass(frozen=True)
class Point:
    """One value of an axis: its name and the settings that it stands for."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: its folder. point: {axis: name of the point}. config: resolved.
    """

    name: str
    point: dict[str, str]
    config: Config


@dataclass(frozen=True)
class Study:
    """A study, expanded.

    Attributes:
        name, title: of the study. folder: which holds all of it. file: the YAML.
        axes: {axis: [names of its points]}, in the order of the file.
        runs: in the order of the grid, the last axis changing fastest.
        base: the configuration before any axis.
    """

    name: str
    title: str
    folder: Path
    file: Path
    axes: dict[str, list[str]]
    runs: list[Run]
    base: Config
    limits: Limits = field(default_factory=Limits)


def load_study(path: str | Path, folder: str | Path | None = None) -> Study:
    """Read and expand a study's file; nothing is loaded or written.

    Args:
        folder: of the study, instead of the file's `dir`/`name`.

    Raises:
        UserError: for anything in it that does not fit, naming the place in the file.
    """
    path = Path(path)
    tree = read_tree(path)
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), KEYS)}")
    name = str(tree.get("name", path.stem))
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"{path}: name '{name}' must be fit for a folder: letters, digits, _ . + -")
    folder = Path(folder) if folder else Path(str(tree.get("dir", "runs"))) / name
    limits = read_limits(tree.get("limits"), path)
    axes = read_axes(tree.get("axes"), path)
    fixed = flat_settings(tree.get("set") or {}, f"{path}: set")
    check_clashes(axes, fixed, path)

    shared = yaml_layers(path.parent / str(tree["config"])) if tree.get("config") else []
    shared.append((nested(fixed), f"{path}: set"))
    node = merge_layers(shared)
    excluded = read_excluded(tree.get("exclude"), axes, path)
    runs = []
    for chosen in grid(axes):
        point = {axis: one.name for axis, one in chosen.items()}
        if any(all(point[axis] == name for axis, name in rule.items()) for rule in excluded):
            continue
        run_name = name_of(axes, point)
        own = [(nested(one.settings), f"{path}: axes.{axis}, point {one.name}") for axis, one in chosen.items()]
        own.append((OmegaConf.create({"run": {"name": run_name, "dir": str(folder)}}), str(path)))
        runs.append(Run(run_name, point, to_object(merge_layers([*shared, *own]), path)))
    check_runs_of(runs, limits, path)
    return Study(
        name,
        str(tree.get("title", name)),
        folder,
        path,
        {axis: [one.name for one in points] for axis, points in axes.items()},
        runs,
        to_object(node, path),
        limits,
    )


def read_tree(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries."""
    if not path.is_file():
        raise UserError(f"no study file {path}; see configs/studies/ for those that ship")
    try:
        # OmegaConf's reader takes 1e-4 for a number, plain YAML for a string
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping with config and axes")
    return {str(key): value for key, value in tree.items()}


def read_limits(tree: Any, path: Path) -> Limits:
    """The section `limits`."""
    tree = tree or {}
    known = Limits.__dataclass_fields__
    if not isinstance(tree, dict):
        raise UserError(f"{path}: limits must be a mapping of {', '.join(known)}")
    for key, value in tree.items():
        if key not in known:
            raise UserError(f"{path}: unknown key 'limits.{key}'{nearest(str(key), known)}")
        whole = key != "minutes"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < 0:
            raise UserError(f"{path}: limits.{key}={value!r} must be a {'whole ' if whole else ''}number from 0")
    return Limits(**tree)


def read_axes(tree: Any, path: Path) -> dict[str, list[Point]]:
    """The section `axes`: {axis: its points}."""
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: axes must name at least one axis, for example axes: {{run.seed: [1, 2]}}")
    keys = all_keys()
    axes = {}
    for axis, values in tree.items():
        axis, where = str(axis), f"{path}: axes.{axis}"
        if isinstance(values, list):
            if axis not in keys:
                raise UserError(f"{where} names no key{nearest(axis, keys)}")
            points = [Point(label(axis, value), {axis: value}) for value in values]
        elif isinstance(values, dict) and values and all(isinstance(value, list) for value in values.values()):
            points = zipped(values, where, keys)
        elif isinstance(values, dict):
            points = []
            for name, settings in values.items():
                if not isinstance(settings, dict):
                    raise UserError(f"{where}.{name} must be a mapping of keys, not {settings!r}")
                points.append(Point(safe(str(name)), flat_settings(settings, f"{where}.{name}")))
        else:
            raise UserError(f"{where} must be a list of values, or a mapping (zipped keys or named points)")
        if not points:
            raise UserError(f"{where} is empty, which leaves no run; give it a value or leave it out")
        names = [one.name for one in points]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{where} has '{name}' twice; leave one out or name the points")
        axes[axis] = points
    return axes


def zipped(values: dict[str, list[Any]], where: str, keys: list[str]) -> list[Point]:
    """Points of keys that change together; each is called after the first key's value."""
    lengths = {key: len(column) for key, column in values.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"{where}: zipped keys need equally many values: {told}")
    for key in values:
        if key not in keys:
            raise UserError(f"{where}.{key} names no key{nearest(str(key), keys)}")
    first = next(iter(values))
    rows = zip(*values.values(), strict=True)
    return [Point(label(first, row[0]), dict(zip(values, row, strict=True))) for row in rows]


def flat_settings(tree: Any, where: str) -> dict[str, Any]:
    """{dotted key: value} of settings written dotted or nested; unknown keys raise."""
    if not isinstance(tree, dict):
        raise UserError(f"{where} must be a mapping of keys, not {tree!r}")
    keys = all_keys()
    flat: dict[str, Any] = {}
    for key, value in walk(tree):
        if key in flat:
            raise UserError(f"{where} sets {key} twice")
        if key not in keys and not any(key.startswith(f"{known}.") for known in keys):
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, keys)}")
        flat[key] = value
    return flat


def walk(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) down to the settings' own leaves; a leaf that is a mapping stays whole."""
    keys = all_keys()
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and full not in keys:
            yield from walk(value, f"{full}.")
        else:
            yield full, value


def check_clashes(axes: dict[str, list[Point]], fixed: dict[str, Any], path: Path) -> None:
    """No key may be set in two places: the order of the axes would decide."""
    owner = {key: "set" for key in fixed}
    for axis, points in axes.items():
        own = {key for one in points for key in one.settings}
        for key in sorted(own):
            if key in owner:
                raise UserError(f"{path}: {owner[key]} and axes.{axis} clash: both set {key}; keep it in one of them")
            if any(key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in owner):
                raise UserError(f"{path}: axes.{axis} sets {key}, part of which is set elsewhere; keep it in one place")
        owner |= {key: f"axes.{axis}" for key in own}
    for key in RESERVED:
        if key in owner:
            raise UserError(f"{path}: {owner[key]} sets {key}, which the study decides; leave it out")


def read_excluded(tree: Any, axes: dict[str, list[Point]], path: Path) -> list[dict[str, str]]:
    """The section `exclude`: combinations of points to leave out."""
    rules = []
    for rule in tree or []:
        if not isinstance(rule, dict) or not rule:
            raise UserError(f"{path}: exclude must be a list of mappings {{axis: point}}, not {rule!r}")
        clean = {}
        for axis, name in rule.items():
            if axis not in axes:
                raise UserError(f"{path}: exclude names the axis '{axis}'{nearest(str(axis), axes)}")
            names = [one.name for one in axes[axis]]
            text = safe(str(name)) if safe(str(name)) in names else label(str(axis), name)
            if text not in names:
                raise UserError(
                    f"{path}: exclude names {axis}: {name}, which is not one of its points{nearest(text, names)}"
                )
            clean[axis] = text
        rules.append(clean)
    return rules


def check_runs_of(runs: list[Run], limits: Limits, path: Path) -> None:
    """There are some runs, not too many, and their names differ."""
    if not runs:
        raise UserError(f"{path}: the grid is empty: exclude leaves out every combination")
    if len(runs) > limits.runs:
        raise UserError(f"{path}: {len(runs)} runs, and limits.runs is {limits.runs}; raise it or shorten an axis")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs would be called {name}; name the points of the axes")
        if name in FOLDERS:
            raise UserError(f"{path}: a run may not be called {name}; rename the point")


def name_of(axes: dict[str, list[Point]], point: dict[str, str]) -> str:
    """A run's name: its points, of the axes that have more than one."""
    varying = [axis for axis, points in axes.items() if len(points) > 1] or list(axes)[:1]
    return "_".join(point[axis] for axis in varying)


def label(key: str, value: Any) -> str:
    """A point's name from its value: a word as it is, a number after the key's last part (`seed1`)."""
    if isinstance(value, str):
        return safe(Path(value).name or value)
    return safe(f"{key.rsplit('.', 1)[-1]}{value}")


def safe(text: str) -> str:
    """Letters, digits and `.+-` only: names become folders and parts of links."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "value"


def nested(flat: dict[str, Any]) -> Any:
    """{dotted key: value} as an OmegaConf tree."""
    node = OmegaConf.create({})
    for key, value in flat.items():
        OmegaConf.update(node, key, value, force_add=True)
    return node


def to_object(node: DictConfig, path: Path) -> Config:
    """The configuration of a merged node."""
    try:
        return to_config(node)
    except (OmegaConfBaseException, UserError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key (old -> new)` of two flat configurations, except for the run's place and what starts it."""
    return [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key != "run.dir" and not key.startswith("cluster.")
    ]


def flat_config(config: Config) -> dict[str, Any]:
    """{dotted key: value} of a configuration."""
    return flatten(to_dict(config))
