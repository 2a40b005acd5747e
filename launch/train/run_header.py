"""What stands above the recipe in a run's recipe.yaml."""

import json
import re
import secrets
from dataclasses import dataclass


def new_run_id() -> str:
    """What a run that begins is known by."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class RunHeader:
    """What a run's recipe.yaml says, as comments above the recipe, beyond the recipe itself. Any text is read back."""

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
        pairs = [("recipe", self.recipe), ("code", self.code), ("data", self.data)]
        pairs += [("parent", self.parent)] if self.parent else []
        pairs += [("run", self.run)] if self.run else []
        pairs += [("change", change) for change in self.changes]
        return "".join(f"# {key}: {_as_line(text)}\n" for key, text in pairs)

    @classmethod
    def parse(cls, text: str) -> "RunHeader":
        """Read the lines above a recipe; a line that is missing reads as an empty string."""
        pairs = [
            (match[1], _from_line(match[2])) for match in re.finditer(r"^# (\w+): (.*)$", text, flags=re.MULTILINE)
        ]
        single = dict(pairs)
        changes = tuple(value for key, value in pairs if key == "change")
        recipe, code, data, parent, run = (single.get(key, "") for key in ("recipe", "code", "data", "parent", "run"))
        return cls(recipe, code, data, changes, parent, run)


def _as_line(text: str) -> str:
    """The text as it is; in quotes, as JSON, where it would end the comment, be no YAML or look like such quotes."""
    if text.isprintable() and not text.startswith('"'):
        return text
    return json.dumps(text).replace("\x7f", "\\u007f")


def _from_line(line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return str(json.loads(line))
    except ValueError:
        return line
