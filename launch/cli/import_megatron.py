"""`nanotron-recipes data import-megatron`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.next_line import command
from launch.cli.options import local_path
from nanotron_recipes.errors import UserError


def import_megatron(
    prefix: Annotated[
        Path,
        typer.Argument(metavar="PREFIX", parser=local_path, help="The .bin and .idx files, without their endings."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", parser=local_path, help="Folder to write; it must not exist yet.")
    ],
    tokenizer: Annotated[
        Path, typer.Option(metavar="FOLDER", parser=local_path, help="The tokenizer that the tokens are of.")
    ],
) -> None:
    """Turn Megatron-core's tokens (PREFIX.bin, PREFIX.idx) into shards with a manifest.

    Example:

    `nanotron-recipes data import-megatron corpora/web_text_document corpora/web --tokenizer my-tokenizer`
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from data.megatron import import_megatron as write_shards
    from data.megatron import share_ending_in_eos
    from data.tokenizer import read_tokenizer
    from nanotron_recipes.numbers import short_number

    name = prefix.name.removesuffix(".bin").removesuffix(".idx")
    if name in ("", ".."):
        raise UserError(f"{prefix}: expected the .bin and .idx files, without their endings")
    prefix = prefix.with_name(name)
    info = read_tokenizer(tokenizer)
    size = _size(prefix.with_name(f"{prefix.name}.bin"))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=size)
        manifest = write_shards(prefix, out, info, lambda count: progress.advance(task, count))
    for reason, count in manifest.rejected.items():
        print(f"note: {count} left out: {reason}")
    share = share_ending_in_eos(out, manifest)
    if share < 1:
        print(
            f"note: {1 - share:.1%} of the documents do not end with {info.eos_token}: a model learns from the others "
            "alone where a document ends"
        )
    tokens, documents = short_number(manifest.train.tokens), short_number(manifest.train.documents)
    print(f"{out}: {tokens} tokens in {documents} documents, none of them held out for validation")
    folder = f"data_stages.0.data.dataset.dataset_folder=[{out}]"
    print(f"next: {command('nanotron-recipes', 'data', 'plan', 'RECIPE', '--set', folder)}")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
