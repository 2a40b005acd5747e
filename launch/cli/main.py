"""The console script `nanotron-recipes`.

A command is a function in its own module, found through `COMMANDS` and imported when it is asked for. These modules
import torch, transformers and datatrove only inside functions, so that help and the quick commands answer at once.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.cli.usage import CALL_ERROR, PROGRAM, call_mistake, system_mistake
from launch.train.streams import open_standard_streams, silence
from nanotron_recipes.errors import UserError, nearest_name, user_error

COMMANDS = {
    "list": "launch.cli.list_recipes:list_recipes",
    "show": "launch.cli.show:show",
    "validate": "launch.cli.validate:validate",
    "tokenize": "launch.cli.tokenize:tokenize",
    "data show": "launch.cli.data_show:data_show",
    "data plan": "launch.cli.data_plan:data_plan",
    "data stage": "launch.cli.data_stage:data_stage",
    "data verify": "launch.cli.data_verify:data_verify",
    "data fertility": "launch.cli.data_fertility:data_fertility",
    "data import-megatron": "launch.cli.import_megatron:import_megatron",
    "pretrain": "launch.cli.pretrain:pretrain",
    "status": "launch.cli.status:status",
    "verify-topology": "launch.cli.verify_topology:verify_topology",
    "checkpoints": "launch.cli.checkpoints:checkpoints",
    "evaluate": "launch.cli.evaluate:evaluate",
    "export": "launch.cli.export:export",
    "import": "launch.cli.import_hf:import_folder",
}
"""Name of each command and `module:function` of what runs it; help shows them in this order. A name of two words is a
command of a group."""
GROUPS = {"data": "Look at what a recipe reads, bring it to this machine, and check it."}
"""What help says of each group."""


class LazyCommands(TyperGroup):
    """The commands of the table, or of one of its groups, each imported when it is first needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        prefix = f"{self.name} " if self.name in GROUPS else ""
        inside = [name.removeprefix(prefix) for name in COMMANDS if name.startswith(prefix)]
        return list(dict.fromkeys(name.split()[0] for name in inside))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name. Raises UserError with the nearest name."""
        names = self.list_commands(ctx)
        if cmd_name not in names:
            expected = f"no such command; expected one of {', '.join(names)}"
            source = f"{self.name} {cmd_name}" if self.name in GROUPS else cmd_name
            raise user_error(expected, source=source, nearest=nearest_name(cmd_name, names))
        if self.name in GROUPS:
            return _command(cmd_name, COMMANDS[f"{self.name} {cmd_name}"])
        return _group(cmd_name) if cmd_name in GROUPS else _command(cmd_name, COMMANDS[cmd_name])


def main() -> None:
    """Run the command line and exit: 0, 2 for a user's mistake (one line on stderr), 1 for a failure, 130 for ^C."""
    _prepare_streams()
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    """Return the exit code of one call. Without arguments it is help, and as wrong as any call without a command."""
    try:
        code = _root().main(args=arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code or (0 if arguments else 2)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        silence(sys.stdout)  # nobody reads any more: what is still buffered goes nowhere when the interpreter ends
        return 1
    except UserError as error:
        mistake = error
    except CALL_ERROR as error:
        mistake = call_mistake(error)
    except OSError as error:
        mistake = system_mistake(error)
    print(f"error: {mistake}", file=sys.stderr)
    return 2


def _prepare_streams() -> None:
    """Print what an encoding cannot show as a question mark, and print nowhere what has been closed."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _root() -> Any:
    app = typer.Typer(cls=LazyCommands, add_completion=False, rich_markup_mode="markdown")
    app.callback()(_introduction)
    return typer.main.get_command(app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        raise typer.Exit


def _introduction(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain SmolLM3-shaped language models on nanotron, from a laptop to a cluster, one recipe a run."""


def _group(name: str) -> Any:
    app = typer.Typer(cls=LazyCommands, name=name, help=GROUPS[name], add_completion=False, rich_markup_mode="markdown")
    app.callback()(lambda: None)
    return typer.main.get_command(app)


def _command(name: str, place: str) -> Any:
    module, function = place.split(":")
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name, no_args_is_help=False)(getattr(import_module(module), function))
    return typer.main.get_command(app)
