"""`nanotron-recipes import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.next_line import command
from launch.cli.options import local_path


def import_folder(
    hf_dir: Annotated[
        Path,
        typer.Argument(
            metavar="HF_DIR",
            parser=local_path,
            help="Folder with config.json and safetensors: SmolLM3, Llama or Qwen3.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=local_path, help="New folder for the checkpoint.")],
) -> None:
    """Bring a Hugging Face folder back: a checkpoint of ours in the same dtype, with a recipe of the model.

    Refused, by name, is what our model does not compute: biases, scaled RoPE, sliding windows, heads that are
    not hidden_size / num_attention_heads wide, float16 weights, other classes.

    Example: `nanotron-recipes import my-model imported`
    """
    from model.hf_import import import_hf

    try:
        report = import_hf(hf_dir, out)
    except RuntimeError as failure:
        from parallel.checkpoint_writer import SaveFailed  # and torch, which mistakes need not wait for

        if not isinstance(failure, SaveFailed):
            raise
        print(f"error: {out}: {failure}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{report.hf_class} of {report.num_parameters:,} parameters, {report.dtype}: {out}")
    for note in report.notes:
        print(f"note: {note}")
    settings = [f"checkpoints.resume_checkpoint_path={out}", "checkpoints.load_lr_scheduler=false"]
    settings.append("checkpoints.load_optimizer=false")
    sets = [word for setting in settings for word in ("--set", setting)]
    print(f"next: {command('nanotron-recipes', 'pretrain', 'RECIPE', *sets)}")
    print(f"      RECIPE: your data and schedule, with the model and tokenizer sections of {out / 'recipe.yaml'}")
