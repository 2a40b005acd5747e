"""What stands above the recipe in a run's recipe.yaml."""

import re
import secrets
from dataclasses import dataclass


def new_run_id() -> str:
    """What a run that begins is known by."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class RunHeader:
    """What a run's recipe.yaml says, as comments above the recipe, beyond the recipe itself."""

    recipe: str
    """Name or file stem of the recipe that the run was started from."""
    code: str
    """Version of the code that started it."""
    data: str
    """Fingerprint of the data."""
    changes: tuple[str, ...] = ()
    """One line for each change that a resume brought: the step, the key, the old and the new value."""
    parent: str = ""
    """The checkpoint that the run started from, where it is a branch of another run."""
    run: str = ""
    """Drawn when the run began: tells it from others of its name, wherever its folder is moved to."""

    def as_comments(self) -> str:
        """The lines above the recipe."""
        lines = [f"# recipe: {self.recipe}", f"# code: {self.code}", f"# data: {self.data}"]
        lines += [f"# parent: {self.parent}"] if self.parent else []
        lines += [f"# run: {self.run}"] if self.run else []
        return "\n".join([*lines, *(f"# change: {change}" for change in self.changes)]) + "\n"

    @classmethod
    def parse(cls, text: str) -> "RunHeader":
        """Read the lines above a recipe; a line that is missing reads as an empty string."""
        pairs = [(match[1], match[2]) for match in re.finditer(r"^# (\w+): (.*)$", text, flags=re.MULTILINE)]
        single = dict(pairs)
        changes = tuple(value for key, value in pairs if key == "change")
        recipe, code, data, parent, run = (single.get(key, "") for key in ("recipe", "code", "data", "parent", "run"))
        return cls(recipe, code, data, changes, parent, run)
