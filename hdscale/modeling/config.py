"""`HyperdecoderConfig`: all that is needed to build a model, or to build it again from an export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError, nearest, one_line
from hdscale.modeling.settings import MethodSettings
from hdscale.settings import check_choice, choices

CONFIG_FILE = "hdscale_config.json"
"""The configuration's file in an export."""


@dataclass
class HyperdecoderConfig:
    """The base, the method that adapts it, and the tasks that task-conditioned methods learn embeddings for.

    Attributes:
        model: the frozen base.
        method: the method and its sizes.
        tasks: task names in the order of their ids.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    tasks: list[str] = field(default_factory=list)

    def task_id(self, task: str, unseen: bool = False) -> int:
        """The id of a task by its name.

        Args:
            task: its name.
            unseen: give -1, which stands for the mean of the learned task embeddings (Table 5), for a task that the
                model was not trained on.

        Raises:
            UserError: for such a task otherwise, naming the nearest.
        """
        if task in self.tasks:
            return self.tasks.index(task)
        if unseen:
            return -1
        raise UserError(f"task '{task}': the model was not trained on it{nearest(task, self.tasks)}")

    def validate(self) -> None:
        """Check base and method by their fields' own rules.

        Raises:
            UserError: for the first value that its field does not allow.
        """
        self.model.validate("model.")
        self.method.validate("method.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HyperdecoderConfig:
        """The configuration of nested dictionaries, as `to_dict` gives them.

        Raises:
            UserError: for keys or values that the settings do not have.
        """
        check_choices(ModelSettings, values.get("model", {}), "model.")
        check_choices(MethodSettings, values.get("method", {}), "method.")
        try:
            model = OmegaConf.merge(OmegaConf.structured(ModelSettings), values.get("model", {}))
            method = OmegaConf.merge(OmegaConf.structured(MethodSettings), values.get("method", {}))
        except OmegaConfBaseException as error:
            raise UserError(f"model configuration: {one_line(error)}") from error
        config = cls(
            cast(ModelSettings, OmegaConf.to_object(model)),
            cast(MethodSettings, OmegaConf.to_object(method)),
            list(values.get("tasks", [])),
        )
        config.validate()
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> HyperdecoderConfig:
        """Read `hdscale_config.json`."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a readable hdscale_config.json ({error})") from error


def check_choices(settings: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raise UserError for the first word that is none of its field's choices, by the name that it has in a run's YAML.

    OmegaConf refuses such a word too, but names neither the whole key nor the nearest choice.
    """
    for field_ in dataclasses.fields(settings):
        value = values.get(field_.name)
        if isinstance(value, Mapping) and isinstance(field_.type, type):
            check_choices(field_.type, value, f"{prefix}{field_.name}.")
        elif value is not None:
            check_choice(f"{prefix}{field_.name}", value, choices(field_.type))
