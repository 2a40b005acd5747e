"""Whether the settings of every stage of a pipeline can be read, found out before the first stage runs."""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from posttraining.errors import Mistake
from posttraining.overrides import blame
from posttraining.settings import config_path, load
from posttraining.trainer_keys import TRAINER_CONFIGS, trainer_keys

Stage = tuple[str, str, Sequence[str]]
"""Command, recipe and overrides."""


def check_stages(stages: Sequence[Stage], *, elsewhere: bool) -> None:
    """Raise the Mistake that a stage would end with for a key, a type or a value of its settings.

    `elsewhere`: training is started by a launcher, perhaps on other machines; what TRL says about this machine, such
    as that it has no bf16, does not count then. A process of its own reads the settings: TRL's claim a GPU.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_check, list(stages), elsewhere).result()


def takes_seed(command: str) -> bool:
    """Whether a command's recipe has the key `seed`, and the seed is not one of several `seeds`."""
    names = {entry.name for entry in dataclasses.fields(_settings(command))} | (trainer_keys(command) or set())
    return "seed" in names and "seeds" not in names


def _check(stages: Sequence[Stage], elsewhere: bool) -> None:
    # TRL calls transformers by names that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6", category=FutureWarning)
    for command, recipe, overrides in stages:
        try:
            loaded, _ = load(recipe, command, _classes(command), overrides)
        except Mistake as error:
            # What a class itself refuses has a cause, an unknown key or another type has none.
            if error.__cause__ is None or not elsewhere:
                raise _named(error, command, recipe, overrides) from error
            continue
        if command == "grpo":
            from posttraining.rewards import resolve

            try:
                resolve(loaded[0].rewards, recipe)
            except Mistake as error:
                raise _named(error, command, recipe, overrides) from error


def _named(error: Mistake, command: str, recipe: str, overrides: Sequence[str]) -> Mistake:
    """`error` with the stage in front where it is about a key that the pipeline sets."""
    file = config_path(recipe, command)
    return blame(error, recipe, file, overrides, source=f"the stage `{command} {recipe}`: set")


def _classes(command: str) -> tuple[type[Any], ...]:
    """The dataclasses that a command's recipe is read into."""
    import trl

    trainer = TRAINER_CONFIGS.get(command)
    return (_settings(command), *([getattr(trl, trainer)] if trainer else []))


def _settings(command: str) -> type[Any]:
    """The dataclass of a command's own keys."""
    from posttraining import compare, grpo, merge, prefer, sft
    from posttraining.evaluate.stage import EvaluateSettings
    from posttraining.pairs.settings import PairsSettings

    return {
        "sft": sft.SftSettings,
        "pairs": PairsSettings,
        "prefer": prefer.PreferSettings,
        "compare": compare.CompareSettings,
        "grpo": grpo.GrpoSettings,
        "merge": merge.MergeSettings,
        "evaluate": EvaluateSettings,
    }[command]
