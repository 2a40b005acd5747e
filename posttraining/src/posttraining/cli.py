"""`posttraining COMMAND CONFIG`: one command a stage; what a stage needs is imported when it starts."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer

from posttraining.errors import Mistake, StageFailed, is_full_disk
from posttraining.first_check import check_first
from posttraining.overrides import blame
from posttraining.settings import config_path
from posttraining.usage import CALL_ERROR, PROGRAM, call_mistake

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a pretrained Hugging Face checkpoint to an assistant, one config a stage.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped recipe: tiny, smollm3.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the config, such as data.seed=2 or rewards.0.weight=0.5; may be given again.",
    ),
]
Force = Annotated[
    str | None,
    typer.Option(metavar="REASON", help="Start from a model the guard refuses; the reason goes into the lineage."),
]


@app.command(epilog="Example: posttraining sft tiny --set model=runs/latest-export/export --set output_dir=runs/sft")
def sft(config: Config, set_: Overrides = None) -> str | None:
    """Supervised fine-tuning (and mid-training) on conversations."""
    return _run("sft:SftSettings", "sft", config, set_)


@app.command(epilog="Example: posttraining preview tiny --samples 3")
def preview(
    config: Config,
    set_: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to show; all of them are checked.")] = 3,
) -> str | None:
    """Show samples as an sft config renders them, what is learnt in colour; check that system prompts survive."""
    return _run("preview:SftSettings", "sft", config, set_, samples)


@app.command(epilog="Example: posttraining pairs tiny --set output_dir=runs/pairs")
def pairs(config: Config, set_: Overrides = None) -> str | None:
    """Preference pairs: answers of a strong model that are chosen, of a weak one that are rejected."""
    return _run("pairs.stage:PairsSettings", "pairs", config, set_)


@app.command(epilog="Example: posttraining prefer tiny --set loss_type=[apo_zero]")
def prefer(config: Config, set_: Overrides = None, force: Force = None) -> str | None:
    """Preference optimisation: APO-zero, APO-down or DPO."""
    return _run("prefer:PreferSettings", "prefer", config, set_, force)


@app.command(epilog="Example: posttraining compare tiny --set seeds=[1,2,3]")
def compare(config: Config, set_: Overrides = None, force: Force = None) -> str | None:
    """Losses on the same pairs with several seeds: one csv and one plot."""
    return _run("compare:CompareSettings", "compare", config, set_, force)


@app.command(epilog="Example: posttraining grpo tiny --set output_dir=runs/grpo")
def grpo(config: Config, set_: Overrides = None, force: Force = None) -> str | None:
    """Reinforcement learning from verifiable rewards with a length penalty."""
    return _run("grpo:GrpoSettings", "grpo", config, set_, force)


@app.command(epilog="Example: posttraining merge tiny")
def merge(config: Config, set_: Overrides = None) -> str | None:
    """A weighted mean of models with the same tokenizer and template."""
    return _run("merge:MergeSettings", "merge", config, set_)


@app.command(epilog="Example: posttraining evaluate tiny --set models.mine=runs/latest-export/posttraining/grpo")
def evaluate(config: Config, set_: Overrides = None) -> str | None:
    """Scores with standard errors: held-out arithmetic, format, length; the standard harness for real tasks."""
    return _run("evaluate.stage:EvaluateSettings", "evaluate", config, set_)


@app.command(epilog="Example: posttraining pipeline tiny --set model=runs/latest-export/export")
def pipeline(config: Config, set_: Overrides = None) -> str | None:
    """Every stage from one config, each skipped where it is done; a report and a model card at the end."""
    return _run("pipeline:PipelineSettings", "pipeline", config, set_)


def _run(place: str, stage: str, config: str, overrides: list[str] | None, *arguments: Any) -> str | None:
    """Run a command. `place`: its module and the class of its settings; `stage`: whose recipe it reads.

    Returns what to call next, if anything.
    """
    # The trainers report their use to a server otherwise.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # TRL calls transformers by names that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6", category=FutureWarning)
    name, _, settings = place.partition(":")
    file, words = config_path(config, stage), overrides or []
    keys: set[str] = set()
    try:
        module = import_module(f"posttraining.{name}")
        keys = check_first(config, stage, getattr(module, settings), words)
        command: str | None = module.run(config, words, *arguments)
        return command
    except Mistake as error:
        raise blame(error, config, file, words, keys) from error


def main(arguments: list[str] | None = None, *, last_line: bool = True) -> None:
    """Run a command and, with `last_line`, print what to call next; then exit.

    Exit codes: 0; 2 for a mistake, which is one line on stderr; a StageFailed's code, 1 as a rule, for a command that
    failed; 130 for ^C.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = sys.argv[1:] if arguments is None else arguments
    root: Any = typer.main.get_command(app)
    try:
        # Without arguments it is help, and as wrong as any call without a command.
        result: int | str | None = root.main(args=given or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        if isinstance(result, str) and last_line:
            print(f"next: {result}")
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) and result else 0 if given else 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered has no reader
        sys.exit(1)
    except CALL_ERROR as error:
        refused = call_mistake(error, list(root.commands))
    except Mistake as error:
        refused = error
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_full_disk(error):
            raise
        print("failed: no space left on the disk that the stage writes to; make room and start again", file=sys.stderr)
        sys.exit(1)
    print(f"error: {refused}", file=sys.stderr)
    sys.exit(2)
