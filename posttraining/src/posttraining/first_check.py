"""What can be judged of a command within a moment, before torch and TRL are imported, which takes seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttraining.datasets import DataSettings, check_sources
from posttraining.limits import check_template_file, check_values
from posttraining.model_folder import check_model_folder
from posttraining.settings import check_keys, read_mapping, read_section
from posttraining.trainer_keys import TRAINER_CONFIGS, trainer_keys

_MODELS = ("model", "weak_model")


def check_first(config: str, stage: str, cls: type[Any], overrides: Sequence[str]) -> set[str]:
    """The config's keys. Raises the Mistake that is in the config file or an override: a key that nobody knows, a value
    out of its limits or of another type than `cls` (the stage's own settings) wants; or in the models' folders or the
    data's files."""
    mapping, path = read_mapping(config, stage, overrides)
    others = trainer_keys(stage)
    if others is not None:
        check_keys(mapping, others | {entry.name for entry in dataclasses.fields(cls)}, path, "")
    check_values(TRAINER_CONFIGS.get(stage, ""), mapping, path, "")
    check_template_file(mapping, path)
    settings = read_section(cls, mapping, path)
    for name in _MODELS:
        folder = getattr(settings, name, None)
        if folder is not None:
            check_model_folder(Path(folder))
    data = getattr(settings, "data", None)
    if isinstance(data, DataSettings):
        check_sources(data, path)
    return set(mapping)
