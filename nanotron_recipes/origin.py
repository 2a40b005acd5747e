"""Where a key's value came from, for messages."""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_recipes.overrides import SOURCE as OVERRIDE
from nanotron_recipes.yaml_text import line_of


@dataclass(frozen=True)
class Origin:
    """The file (or other source) of a recipe, its text where there is one, and the keys that --set changed."""

    source: str
    text: str | None = None
    overridden: tuple[str, ...] = ()

    def of(self, key: str) -> str:
        """Return `--set` where it touched the key, else the source with the line of the key or its section."""
        if any(f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in self.overridden):
            return OVERRIDE
        line = line_of(self.text, key) if self.text is not None else None
        return f"{self.source}:{line}" if line else self.source
