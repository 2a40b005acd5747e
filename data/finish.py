"""Completes a tokenized source: checks its shards against their indices, hashes them and writes the manifest last."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from data.corpora import SplitName
from data.manifest import Inputs, Manifest, ShardFile, Split, write_manifest
from data.tokenization_job import Job, source_folder, split_folder
from data.tokenizer import TokenizerInfo
from nanotron_recipes.errors import UserError, one_line


def finish_source(
    job: Job,
    source: str,
    tokenizer: TokenizerInfo,
    settings_sha256: str,
    inputs: Inputs | None,
    console: Console,
) -> None:
    """Writes `manifest.json` for the shards that the job's complete tasks have made, and reports what was left out."""
    notes = _notes(job, source)
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.token_bytes == 2 else "uint32"
    rejected: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for split_name, note in notes:
        # Both splits read the same files; what cannot be used is counted once.
        if split_name == "train":
            rejected.update(note["rejected"])
            examples |= note["examples"]
    for reason, count in rejected.items():
        places = ", ".join(examples[reason])
        more = ", …" if count > len(examples[reason]) else ""
        line = f"warning: {source}: {count} left out: {reason} ({places}{more})"
        console.print(one_line(line), style="yellow", soft_wrap=True, highlight=False, markup=False)
    folder = source_folder(job.folder, source)
    manifest = Manifest(
        source=source,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_sha256=tokenizer.sha256,
        settings_sha256=settings_sha256,
        inputs=inputs,
        made_by="tokenize",
        train=_split(job, source, "train", notes, tokenizer),
        validation=_split(job, source, "validation", notes, tokenizer),
        rejected=dict(rejected),
    )
    write_manifest(folder, manifest)


def _notes(job: Job, source: str) -> list[tuple[SplitName, dict[str, Any]]]:
    ranks = [(rank, task.split) for rank, task in enumerate(job.tasks) if task.source == source]
    try:
        return [(split, json.loads(job.notes_of(rank).read_bytes())) for rank, split in ranks]
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(job.folder, str(error)) from None


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"unfinished work is damaged: {what}; remove {folder} and tokenize again")


def _split(
    job: Job,
    source: str,
    name: SplitName,
    notes: list[tuple[SplitName, dict[str, Any]]],
    tokenizer: TokenizerInfo,
) -> Split:
    mine = [note for split_name, note in notes if split_name == name]
    place, folder = split_folder(job.folder, source, name), source_folder(job.folder, source)
    try:
        files = [_shard(folder, path, tokenizer) for path in sorted(place.glob("*.ds")) if path.stat().st_size]
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(job.folder, str(error)) from None
    split = Split(files=tuple(files), text_bytes=sum(note["text_bytes"] for note in mine))
    expected = sum(note["documents"] for note in mine)
    if split.documents != expected:
        raise _damaged(job.folder, f"{place}: {split.documents} documents in the shards, {expected} were read")
    return split


def _shard(folder: Path, path: Path, tokenizer: TokenizerInfo) -> ShardFile:
    index_path = path.with_name(path.name + ".index")
    ends = np.fromfile(index_path, dtype="<u8").astype(np.int64)
    size = path.stat().st_size
    if not len(ends) or int(ends[-1]) * tokenizer.token_bytes != size or (np.diff(ends, prepend=0) <= 0).any():
        raise ValueError(f"{index_path} does not fit the {size} bytes of {path.name}")
    # datatrove names the tokenizer's file here; nanotron expects what AutoTokenizer can load.
    metadata = path.with_name(path.name + ".metadata")
    metadata.write_text(f"{tokenizer.folder}|{tokenizer.token_bytes}\n{int(ends[-1])}\n{int(ends[-1]):,} tokens")
    return ShardFile(
        name=path.relative_to(folder).as_posix(),
        size=size,
        sha256=_sha256(path),
        index_sha256=_sha256(index_path),
        tokens=int(ends[-1]),
        documents=len(ends),
    )


def _sha256(path: Path) -> str:
    """The file's hash, after what was written has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
