"""One configuration for a run: nests the settings that each room declares.

Order: defaults < YAML file (which may inherit another by `base: other.yaml`) < `key=value` on the command line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdscale.bases.settings import ModelSettings
from hdscale.cluster.settings import ClusterSettings
from hdscale.data.settings import DataSettings
from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError, nearest, one_line
from hdscale.evaluation.settings import EvalSettings
from hdscale.modeling.settings import MethodSettings
from hdscale.runs.settings import RunSettings
from hdscale.settings import Settings, check_choice, choices, setting


@dataclass
class Config(Settings):
    """Everything that defines a run."""

    model: ModelSettings = setting(ModelSettings, "the frozen base")
    method: MethodSettings = setting(MethodSettings, "the adaptation method")
    data: DataSettings = setting(DataSettings, "tasks and text")
    train: TrainSettings = setting(TrainSettings, "optimisation")
    eval: EvalSettings = setting(EvalSettings, "evaluation")
    run: RunSettings = setting(RunSettings, "name and place")
    cluster: ClusterSettings = setting(ClusterSettings, "SLURM")
    deepspeed: Optional[str] = setting(None, "DeepSpeed JSON; default: ds_configs/zero2_bf16.json")
    release: bool = setting(
        False, "begin with the choices of the paper's release (docs/differences.md); other settings come over them"
    )

    def validate(self, prefix: str = "") -> None:
        """Check every section by its fields' own rules."""
        super().validate(prefix)


RELEASE: dict[str, Any] = {
    "train": {"label_smoothing": 0.1, "loss_reduction": "sum", "dtype": "fp32", "adam_epsilon": "uncorrected"},
    "data": {"stsb_step": 0.1},
    "eval": {"select": "metrics", "count_start_token": True, "mrqa_empty": False},
    "deepspeed": "ds_configs/zero2_fp32.json",
}
"""What `release: true` sets: the choices of the paper's release, each of which other settings may override."""


Layer = tuple[DictConfig, str]
"""Some keys, and where they come from, for messages."""


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration of a YAML file and of `key=value` overrides, checked.

    Raises:
        UserError: for a missing file, an unknown key (naming the nearest), or a value that its field does not allow.
    """
    layers = yaml_layers(path) if path else []
    # `release` comes first, under all other overrides
    for override in sorted(overrides or [], key=lambda override: not override.startswith("release=")):
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"'{override}' is not key=value; write for example train.max_steps=100")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"'{override}' cannot be read: {one_line(error)}") from error
        layers.append((parsed, f"command line ({override})"))
    return to_config(merge_layers(layers))


def merge_layers(layers: Sequence[Layer]) -> DictConfig:
    """The defaults with layers of keys over them, later ones over earlier ones.

    `release: true` sets `RELEASE` over all that comes before its layer; that layer's other keys, and later layers, come
    over it. Only the last layer that has the key counts.
    """
    node = OmegaConf.structured(Config)
    deciding = [number for number, (layer, _) in enumerate(layers) if "release" in layer][-1:]
    for number, (layer, origin) in enumerate(layers):
        if [number] == deciding and str(layer.release).lower() == "true":
            node = merge(node, OmegaConf.create(RELEASE), "release")
        node = merge(node, layer, origin)
    return node


def config_from_dict(tree: Mapping[str, Any] | DictConfig, origin: str) -> Config:
    """The configuration of nested dictionaries, checked; `origin` says in messages where they come from."""
    return to_config(merge(OmegaConf.structured(Config), OmegaConf.create(dict(tree)), origin))


def to_config(node: DictConfig) -> Config:
    """The settings objects of a merged configuration, checked by their fields' own rules."""
    config = cast(Config, OmegaConf.to_object(node))
    config.validate()
    return config


def merge(node: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    """`node` with the keys of `layer` over it; the error for a bad key or value says where it came from."""
    layer = layer.copy()
    check_layer(node, layer, origin)
    try:
        return cast(DictConfig, OmegaConf.merge(node, layer))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {one_line(error)}") from error


def check_layer(node: DictConfig, layer: Any, origin: str, prefix: str = "") -> None:
    """Raise on the first key of `layer` that the settings do not have, or that has none of its choices.

    YAML reads an unquoted on or off as true or false: where a field's choices are on and off, the words are put back.
    """
    if not isinstance(layer, DictConfig):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{origin}: {where} must be a mapping of keys, not {layer!r}")
    types = {field.name: field.type for field in dataclasses.fields(cast(Any, OmegaConf.get_type(node)))}
    for key in list(layer):
        if key not in node:
            full = f"{prefix}{key}"
            raise UserError(
                f"{origin}: unknown key '{full}'{nearest(full, [prefix + str(k) for k in node] + all_keys())}"
            )
        if OmegaConf.is_missing(layer, key) or OmegaConf.is_interpolation(layer, key):
            continue
        value = layer[key]
        if value is None:
            continue
        if dataclasses.is_dataclass(types[key]):
            check_layer(node[key], value, origin, f"{prefix}{key}.")
        elif allowed := choices(types[key]):
            if isinstance(value, bool) and "on" in allowed:
                value = layer[key] = "on" if value else "off"
            check_choice(f"{origin}: {prefix}{key}", value, allowed)


def all_keys(settings: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    return [key for key, _ in walk_fields(settings, prefix)]


def walk_fields(settings: Any = Config, prefix: str = "") -> list[tuple[str, dataclasses.Field[Any]]]:
    """(dotted key, field) of every leaf of a settings class, in order of declaration."""
    rows: list[tuple[str, dataclasses.Field[Any]]] = []
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.type):
            rows += walk_fields(field.type, f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, field))
    return rows


def yaml_layers(path: str | Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """A YAML file, and before it the file that its `base:` names (relative to itself), and so on."""
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
    below = [] if base is None else yaml_layers(path.parent / str(base), (*seen, path.resolve()))
    return [*below, (layer, str(path))]


def yaml_with_bases(path: str | Path) -> DictConfig:
    """The keys of a YAML file and of its bases, unchecked and without defaults."""
    return cast(DictConfig, OmegaConf.merge(*(layer for layer, _ in yaml_layers(path))))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries (for YAML and JSON)."""
    return dataclasses.asdict(config)
