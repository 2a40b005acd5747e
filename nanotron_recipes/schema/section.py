"""What all sections of a recipe share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
VARIABLE_IN_WORDS = "the name of an environment variable (letters a to z, digits and _)"

NANOTRON_SEED = 42
"""nanotron's seed where a file leaves it null."""


class Section(BaseModel):
    """A part of the recipe: immutable, without silent conversions, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class NoEffect:
    """Marks a key that is accepted for nanotron's sake and changes nothing here; `reason` becomes the note."""

    reason: str


def null_means(default: object) -> BeforeValidator:
    """Read an explicit null as `default`, as nanotron's own configuration classes do."""
    return BeforeValidator(lambda value: default if value is None else value)


def text_like(pattern: str, words: str) -> AfterValidator:
    """Read text that the whole pattern fits; to who wrote other text a message says it in `words`."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("text_like", words)
        return text

    return AfterValidator(checked)
