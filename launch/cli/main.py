"""The console script `nanotron-recipes`.

A command is a function in its own module, found through `COMMANDS` and imported when it is asked for. These modules
import torch, transformers and datatrove only inside functions, so that help and the quick commands answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from nanotron_recipes.errors import UserError, nearest_name, user_error

COMMANDS = {
    "list": "launch.cli.list_recipes:list_recipes",
    "show": "launch.cli.show:show",
    "validate": "launch.cli.validate:validate",
    "tokenize": "launch.cli.tokenize:tokenize",
    "pretrain": "launch.cli.pretrain:pretrain",
    "verify-topology": "launch.cli.verify_topology:verify_topology",
    "checkpoints": "launch.cli.checkpoints:checkpoints",
    "export": "launch.cli.export:export",
    "import": "launch.cli.import_hf:import_folder",
}
"""Name of each command and `module:function` of what runs it; help shows them in this order."""


class LazyCommands(TyperGroup):
    """The commands of the table, each imported when it is first needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name. Raises UserError with the nearest name."""
        if cmd_name not in COMMANDS:
            expected = f"no such command; expected one of {', '.join(COMMANDS)}"
            raise user_error(expected, source=cmd_name, nearest=nearest_name(cmd_name, COMMANDS))
        module, function = COMMANDS[cmd_name].split(":")
        return _command(cmd_name, getattr(import_module(module), function))


def main() -> None:
    """Run the command line and exit: 0, 2 for a user's mistake (one line on stderr), 1 for a failure, 130 for ^C."""
    try:
        _root().main(prog_name="nanotron-recipes")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _root() -> Any:
    app = typer.Typer(cls=LazyCommands, add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
    app.callback()(_introduction)
    return typer.main.get_command(app)


def _introduction() -> None:
    """Pretrain SmolLM3-shaped language models on nanotron, from a laptop to a cluster, one recipe a run."""


def _command(name: str, function: Callable[..., Any]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name, no_args_is_help=False)(function)
    return typer.main.get_command(app)
