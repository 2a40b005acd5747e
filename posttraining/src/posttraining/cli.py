"""`posttraining COMMAND CONFIG`: one command a stage; what a stage needs is imported when it starts."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer

from posttraining.errors import Mistake, StageFailed

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
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the config; may be given again."),
]
Force = Annotated[
    str | None,
    typer.Option(metavar="REASON", help="Start from a model the guard refuses; the reason goes into the lineage."),
]


@app.command(epilog="Example: posttraining sft tiny --set model=runs/latest-export/export --set output_dir=runs/sft")
def sft(config: Config, set_: Overrides = None) -> None:
    """Supervised fine-tuning (and mid-training) on conversations."""
    _run("sft", config, set_)


@app.command(epilog="Example: posttraining preview tiny --samples 3")
def preview(
    config: Config,
    set_: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to show; all of them are checked.")] = 3,
) -> None:
    """Show samples as an sft config renders them, what is learnt in colour; check that system prompts survive."""
    _run("preview", config, set_, samples)


@app.command(epilog="Example: posttraining pairs tiny --set model=runs/sft --set weak_model=runs/sft/early")
def pairs(config: Config, set_: Overrides = None) -> None:
    """Preference pairs: answers of a strong model that are chosen, of a weak one that are rejected."""
    _run("pairs.stage", config, set_)


@app.command(epilog="Example: posttraining prefer tiny --set loss_type=[apo_zero]")
def prefer(config: Config, set_: Overrides = None, force: Force = None) -> None:
    """Preference optimisation: APO-zero, APO-down or DPO."""
    _run("prefer", config, set_, force)


@app.command(epilog="Example: posttraining compare tiny --set seeds=[1,2,3]")
def compare(config: Config, set_: Overrides = None, force: Force = None) -> None:
    """Losses on the same pairs with several seeds: one csv and one plot."""
    _run("compare", config, set_, force)


@app.command(epilog="Example: posttraining grpo tiny --set model=runs/apo")
def grpo(config: Config, set_: Overrides = None, force: Force = None) -> None:
    """Reinforcement learning from verifiable rewards with a length penalty."""
    _run("grpo", config, set_, force)


@app.command(epilog="Example: posttraining merge tiny")
def merge(config: Config, set_: Overrides = None) -> None:
    """A weighted mean of models with the same tokenizer and template."""
    _run("merge", config, set_)


@app.command(epilog="Example: posttraining evaluate tiny --set models.mine=runs/merged")
def evaluate(config: Config, set_: Overrides = None) -> None:
    """Scores with standard errors: held-out arithmetic, format, length; the standard harness for real tasks."""
    _run("evaluate.stage", config, set_)


@app.command(epilog="Example: posttraining pipeline tiny --set model=runs/latest-export/export")
def pipeline(config: Config, set_: Overrides = None) -> None:
    """Every stage from one config, each skipped where it is done; a report and a model card at the end."""
    _run("pipeline", config, set_)


def _run(module: str, config: str, overrides: list[str] | None, *arguments: Any) -> None:
    # The trainers report their use to a server otherwise.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # TRL calls transformers by names that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6", category=FutureWarning)
    import_module(f"posttraining.{module}").run(config, overrides or [], *arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a Mistake becomes one line on stderr and exit code 2, a StageFailed one and exit code 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(arguments)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
