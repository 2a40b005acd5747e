"""`nanotron-recipes export`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.checkpoint_argument import (
    CheckpointArgument,
    ChosenCheckpoint,
    choose_checkpoint,
    real_path,
    refuse_renamed,
)
from launch.cli.next_line import generation_command, loading_command
from launch.cli.options import local_path
from nanotron_recipes.errors import UserError


def export(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", parser=local_path, help="New folder; an earlier export there is replaced.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the logits with our own model's on real text, in float32.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder for plain transformers: weights, configuration, tokenizer, card.

    Examples:

    `nanotron-recipes export runs/latest my-model --verify`

    `nanotron-recipes export tiny-1 my-model`

    `nanotron-recipes export runs/tiny-1/checkpoints/800 my-model-800`
    """
    from model.hf_export import check_export_target

    chosen = choose_checkpoint(checkpoint, Path("runs"))
    _refuse_among_checkpoints(out, chosen)
    check_export_target(out)
    with ExitStack() as stack:
        _export(_whole(chosen, stack), out, verify)


def _whole(chosen: ChosenCheckpoint, stack: ExitStack) -> ChosenCheckpoint:
    """The checkpoint in one folder, where its parts lie on the disks of several nodes that are seen from here."""
    from launch.train.run_folder import NODE
    from launch.train.seen_checkpoint import whole_checkpoint

    if chosen.run is None or chosen.step is None:
        return chosen
    refuse_renamed(chosen)
    if NODE not in str(chosen.run.checkpoints):
        return chosen
    return replace(chosen, folder=stack.enter_context(whole_checkpoint(chosen.run, chosen.step)))


def _export(chosen: ChosenCheckpoint, out: Path, verify: bool) -> None:
    from launch.evaluate.prompts import one_prompt
    from launch.train.run_tokenizer import run_tokenizer
    from model.hf_export import export_checkpoint
    from nanotron_recipes.numbers import counted

    tokenizer = run_tokenizer(chosen.run, chosen.recipe)
    if tokenizer is None:
        print("note: the recipe's tokenizer is not a folder here; the export holds none", file=sys.stderr)
    report = export_checkpoint(
        chosen.folder, out, tokenizer_dir=tokenizer, card=_card(chosen, out, has_tokenizer=tokenizer is not None)
    )
    print(
        f"{report.hf_class} of {report.num_parameters:,} parameters, {report.dtype}, "
        f"{report.weight_bytes / 1e6:,.1f} MB in {counted(len(report.weight_files), 'file')}: {out}"
    )
    if verify:
        _verify(chosen, out)
    has_prompt = tokenizer is not None
    print(f"next: {generation_command(out, one_prompt(chosen.recipe)) if has_prompt else loading_command(out)}")


def _refuse_among_checkpoints(out: Path, chosen: ChosenCheckpoint) -> None:
    """What lies there counts as a step, or as a damaged file of one."""
    target = real_path(out)
    places = [target, *target.parents]
    own = [real_path(chosen.folder), *([real_path(chosen.run.checkpoints)] if chosen.run else [])]
    of_runs = [place for place in places if place.name == "checkpoints" and (place.parent / "recipe.yaml").is_file()]
    if of_runs or any(place in own for place in places):
        raise UserError(f"{out}: expected a folder that is not among the checkpoints of a run")


def _card(chosen: ChosenCheckpoint, out: Path, *, has_tokenizer: bool) -> str | None:
    from launch.evaluate.card_facts import facts_of_run
    from launch.evaluate.prompts import one_prompt
    from model.model_card import render_card

    if chosen.run is None or chosen.step is None:
        return None
    facts = facts_of_run(chosen.run, chosen.recipe, chosen.step, name=out.name)
    return render_card(replace(facts, has_tokenizer=has_tokenizer, prompt=one_prompt(chosen.recipe)))


def _verify(chosen: ChosenCheckpoint, out: Path) -> None:
    from launch.evaluate.verification import LOGIT_TOLERANCE, verify_checkpoint

    difference = verify_checkpoint(chosen.folder, chosen.recipe, out)
    verdict = f"logits differ by at most {difference:.1e} from our model's (allowed: {LOGIT_TOLERANCE:.0e})"
    if not difference <= LOGIT_TOLERANCE:
        print(f"error: {out} is wrong: {verdict}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"verified: {verdict}")
