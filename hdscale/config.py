"""One configuration for a run: nests the settings that each room declares.

Order: defaults < YAML file (which may inherit another by `base: other.yaml`) < `key=value` on the command line.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdscale.bases.settings import ModelSettings
from hdscale.cluster.settings import ClusterSettings
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import expand_tasks
from hdscale.engine.settings import RunSettings, TrainSettings
from hdscale.errors import UserError, nearest
from hdscale.evaluation.settings import EvalSettings
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.settings import MethodSettings
from hdscale.settings import setting


@dataclass
class Config:
    """Everything that defines a run."""

    model: ModelSettings = setting(ModelSettings, "the frozen base")
    method: MethodSettings = setting(MethodSettings, "the adaptation method")
    data: DataSettings = setting(DataSettings, "tasks and text")
    train: TrainSettings = setting(TrainSettings, "optimisation")
    eval: EvalSettings = setting(EvalSettings, "evaluation")
    run: RunSettings = setting(RunSettings, "name and place")
    cluster: ClusterSettings = setting(ClusterSettings, "SLURM")
    deepspeed: Optional[str] = setting(None, "DeepSpeed JSON; default: ds_configs/zero2_bf16.json")


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration of a YAML file and of `key=value` overrides, checked.

    Raises:
        UserError: for a missing file, an unknown key (naming the nearest), or a value of the wrong type.
    """
    node = OmegaConf.structured(Config)
    for layer, origin in [(yaml_with_bases(path), str(path))] if path else []:
        node = merge(node, layer, origin)
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"'{override}' is not key=value; write for example train.max_steps=100")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"'{override}' cannot be read: {one_line(error)}") from error
        node = merge(node, parsed, f"command line ({override})")
    return OmegaConf.to_object(node)


def merge(node: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    """`node` with the keys of `layer` over it; the error for a bad key or value says where it came from."""
    check_keys(node, OmegaConf.to_container(layer, resolve=False), origin)
    try:
        return OmegaConf.merge(node, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {one_line(error)}") from error


def check_keys(node: DictConfig, layer: Any, origin: str, prefix: str = "") -> None:
    """Raise on the first key of `layer` that the settings do not have, naming the nearest one."""
    if not isinstance(layer, dict):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{origin}: {where} must be a mapping of keys, not {layer!r}")
    for key, value in layer.items():
        if key not in node:
            full = f"{prefix}{key}"
            raise UserError(
                f"{origin}: unknown key '{full}'{nearest(full, [prefix + str(k) for k in node] + all_keys())}"
            )
        child = OmegaConf.select(node, str(key)) if OmegaConf.is_dict(node) else None
        if isinstance(child, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(child)) and value is not None:
            check_keys(child, value, origin, f"{prefix}{key}.")


def all_keys(settings: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    return [key for key, _ in walk_fields(settings, prefix)]


def walk_fields(settings: type = Config, prefix: str = "") -> list[tuple[str, dataclasses.Field]]:
    """(dotted key, field) of every leaf of a settings class, in order of declaration."""
    rows: list[tuple[str, dataclasses.Field]] = []
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.type):
            rows += walk_fields(field.type, f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, field))
    return rows


def yaml_with_bases(path: str | Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file over the file that its `base:` names (relative to itself), and so on."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no configuration file {path}; see configs/ for those that ship")
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` goes in a circle")
    try:
        layer = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise UserError(f"{path}: must be a mapping of keys")
    base = layer.pop("base", None)
    if base is None:
        return layer
    return OmegaConf.merge(yaml_with_bases(path.parent / str(base), (*seen, path.resolve())), layer)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries (for YAML and JSON)."""
    return dataclasses.asdict(config)


def model_config(config: Config) -> HyperdecoderConfig:
    """The part of a run's configuration that defines the model; the ids of tasks count those that train."""
    tasks = expand_tasks(config.data.tasks, config.data)
    return HyperdecoderConfig(config.model, config.method, [task.name for task in tasks if task.trains])


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
