"""What is wrong with a call, in one line."""

from __future__ import annotations

import re
from typing import Any

import typer

from posttraining.errors import Mistake, nearest_name

PROGRAM = "posttraining"

# typer has a copy of click inside, or imports click, as its release is; the base of all wrong calls is the same.
CALL_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""What typer raises for a wrong call."""


def call_mistake(error: Any, commands: list[str]) -> Mistake:
    """Turn what typer raises for a wrong call into one line, with the nearest of the options or of `commands`."""
    context: Any = getattr(error, "ctx", None)
    command = context.command_path.removeprefix(PROGRAM).strip() if context else ""
    before = f"{command}: " if command else ""
    if hasattr(error, "possibilities"):
        known = [option for one in context.command.params for option in one.opts if option.startswith("-")]
        nearest = nearest_name(error.option_name, [*known, "--help"])
        mend = f"; did you mean {nearest}?" if nearest else f"; expected one of {', '.join([*known, '--help'])}"
        return Mistake(f"{before}{error.option_name}: no such option{mend}")
    message = error.format_message()
    unknown = re.match(r"No such command '(.*?)'", message)
    if unknown:
        nearest = nearest_name(unknown[1], commands)
        expected = f"no such command; expected one of {', '.join(commands)}"
        return Mistake(f"{unknown[1]}: {expected}{f'; did you mean {nearest}?' if nearest else ''}")
    message = message.removesuffix(".")
    see = " ".join(filter(None, (PROGRAM, command, "--help")))
    return Mistake(f"{before}{message[:1].lower()}{message[1:]}; see `{see}`")
