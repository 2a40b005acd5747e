"""What is wrong with a call, in one line."""

from __future__ import annotations

import os
import re
from typing import Any

import typer

from nanotron_recipes.errors import UserError, nearest_name, shorten, user_error

PROGRAM = "nanotron-recipes"

# typer has a copy of click inside, or imports click, as its release is; the base of all wrong calls is the same.
CALL_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""What typer raises for a wrong call."""

_LONGEST = 300


def call_mistake(error: Any) -> UserError:
    """Turn what typer raises for a wrong call into a UserError with the nearest option or choice."""
    context = getattr(error, "ctx", None)
    command = context.command_path.removeprefix(PROGRAM).strip() if context else ""
    if hasattr(error, "possibilities"):
        return _unknown_option(command, error.option_name, context)
    message = error.format_message().removesuffix(".").replace("Value error, ", "")
    message = shorten(message[:1].lower() + message[1:], _LONGEST)
    nearest = _nearest_choice(message)
    see = "" if nearest else f"; see `{' '.join(filter(None, (PROGRAM, command, '--help')))}`"
    return user_error(f"{message}{see}", source=command, nearest=nearest)


def system_mistake(error: OSError) -> UserError:
    """Turn an error of the system into `file: reason`."""
    reason = shorten(error.strerror or str(error), _LONGEST)
    name = error.filename
    if name is None and isinstance(error, FileNotFoundError) and not _has_working_directory():
        name = "the working directory"
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return user_error(reason, source=None if name is None else str(name))


def _unknown_option(command: str, name: str, context: Any) -> UserError:
    known = [option for parameter in context.command.params for option in parameter.opts if option.startswith("-")]
    known.append("--help")
    nearest = nearest_name(name, known)
    listing = "" if nearest else f"; expected one of {', '.join(known)}"
    return user_error(f"no such option{listing}", source=command, key=name, nearest=nearest)


def _nearest_choice(message: str) -> str | None:
    """typer names the choices of an option in its message only."""
    match = re.search(r"'([^']*)' is not one of (.*)", message)
    return nearest_name(match[1], re.findall(r"'([^']*)'", match[2])) if match else None


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
