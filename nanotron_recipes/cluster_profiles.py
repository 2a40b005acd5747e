"""Cluster profiles: what ranks need in their environment on one kind of cluster, each variable with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from nanotron_recipes.complaints import complaint
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import VARIABLE, VARIABLE_IN_WORDS, Section, text_like
from nanotron_recipes.schema.slurm import Slurm
from nanotron_recipes.yaml_text import parse_yaml


class Variable(Section):
    """An environment variable of the ranks."""

    name: Annotated[str, text_like(VARIABLE, VARIABLE_IN_WORDS)]
    """Its name."""

    value: Annotated[str, text_like(r"[^\n\x00]*", "text of one line")]
    """Its value; one that is set already when the job starts wins."""

    reason: Annotated[str, text_like(r"[^\n]+", "text of one line, and not empty")]
    """Why."""


class Profile(Section):
    """One kind of cluster."""

    slurm: dict[str, Any] = Field(default_factory=dict)
    """Keys of section `slurm` that stand where the recipe has none."""

    environment: list[Variable] = Field(default_factory=list)
    """Variables of the ranks."""


def shipped_profiles() -> dict[str, Path]:
    """Return the profiles that come with the code, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "profiles").glob("*.yaml"))}


def load_profile(name_or_path: str | None) -> Profile:
    """Read a shipped profile by name or a file by path; an empty one for None.

    Raises UserError: no such profile, or it is not one.
    """
    if name_or_path is None:
        return Profile()
    shipped = shipped_profiles()
    path = shipped.get(name_or_path, Path(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        expected = f"expected one of {', '.join(shipped)}, or the path of a readable file"
        nearest = nearest_name(name_or_path, shipped)
        raise user_error(expected, key="slurm.profile", value=name_or_path, nearest=nearest) from None
    try:
        profile = Profile.model_validate(parse_yaml(text, str(path)) or {})
        Slurm.model_validate(profile.slurm)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error)}") from None
    if "profile" in profile.slurm:
        raise user_error("expected no profile inside a profile", source=str(path), key="slurm.profile")
    return profile


def job_resources(recipe: Recipe) -> tuple[Slurm, list[Variable]]:
    """Return the recipe's `slurm` section filled from its profile, and the profile's variables.

    Raises UserError where the profile cannot be read.
    """
    profile = load_profile(recipe.slurm.profile)
    written = {name: getattr(recipe.slurm, name) for name in recipe.slurm.model_fields_set}
    return Slurm.model_validate({**profile.slurm, **written}), profile.environment
