"""Tokens per CPU-second, start-up and memory of token readers on the same files: ours, three peers, and the limit.

    make bench-loader        or  .venv-bench/bin/python benchmarks/loader.py [--tokens 64000000 --rounds 3 --dry]

Every reader runs in a process of its own, one after the other, and all of them `--rounds` times. Files are warm in the
page cache. Megatron's and LitData's formats are made of the same tokens. What is counted is CPU time: on a machine that
others use as well, it is what one idle core would give.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.loader_contestants import BATCH, CONTESTANTS, EOS, LENGTH, VOCAB_SIZE
from benchmarks.report import ROOT, Section, publish
from data.manifest import Manifest, ShardFile, Split, write_manifest

DOCUMENT_TOKENS = 700
"""Mean length of a document."""

ROWS = {
    "copy_in_ram": ("a copy in RAM, the limit", "no"),
    "ours_tokens": ("ours", "no"),
    "datatrove_tokens": ("datatrove, DatatroveFolderDataset", "no"),
    "megatron_tokens": ("Megatron-core, GPTDataset", "no"),
    "litdata_tokens": ("LitData, StreamingDataset", "no"),
    "ours": ("ours", "yes"),
    "ours_ahead": ("ours, read ahead by a thread", "yes"),
    "datatrove_positions": ("datatrove, positions from the end token", "yes"),
    "megatron_positions": ("Megatron-core, reset_position_ids", "yes"),
}
PEERS = ("datatrove", "megatron-core", "litdata")


def make_data(folder: Path, num_tokens: int) -> None:
    """Two shards of random documents with their index and manifest, and the same in Megatron's and LitData's form."""
    generator = np.random.default_rng(0)
    files, lengths = [], []
    for number in range(2):
        tokens = generator.integers(1, VOCAB_SIZE, num_tokens // 2, dtype=np.uint32)
        ends = np.cumsum(generator.geometric(1 / DOCUMENT_TOKENS, num_tokens // DOCUMENT_TOKENS))
        ends = np.append(ends[ends < len(tokens)], len(tokens)).astype(np.uint64)
        tokens[ends.astype(np.int64) - 1] = EOS
        path = folder / f"{number:05d}.ds"
        tokens.tofile(path)
        ends.tofile(path.with_name(f"{path.name}.index"))
        lengths.append(np.diff(ends.astype(np.int64), prepend=0))
        files.append(
            ShardFile(
                name=path.name,
                size=tokens.nbytes,
                sha256="0" * 64,
                index_sha256="0" * 64,
                tokens=len(tokens),
                documents=len(ends),
            )
        )
    write_manifest(
        folder,
        Manifest(
            source="random",
            dtype="uint32",
            vocab_size=VOCAB_SIZE,
            eos_token_id=EOS,
            tokenizer_sha256="0" * 64,
            settings_sha256="0" * 64,
            train=Split(files=tuple(files)),
            validation=Split(),
        ),
    )
    _make_megatron(folder, np.concatenate(lengths))
    _make_litdata(folder)


def _make_megatron(folder: Path, lengths: npt.NDArray[np.int64]) -> None:
    """`.bin`: the same bytes, read as int32; `.idx`: header, lengths, byte offsets, documents."""
    place = folder / "megatron"
    place.mkdir()
    with (place / "all.bin").open("wb") as out:
        for path in sorted(folder.glob("*.ds")):
            with path.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    with (place / "all.idx").open("wb") as out:
        out.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + (4).to_bytes(1, "little"))
        out.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        out.write(lengths.astype(np.int32).tobytes())
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 4
        out.write(offsets.astype(np.int64).tobytes())
        out.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def litdata_documents(path: str) -> Iterator[Any]:
    """The documents of a shard, for LitData's own conversion."""
    import torch

    tokens = np.fromfile(path, dtype=np.uint32).astype(np.int32)
    first = 0
    for end in np.fromfile(f"{path}.index", dtype=np.uint64).astype(np.int64).tolist():
        yield torch.from_numpy(tokens[first:end])
        first = end


def _make_litdata(folder: Path) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=litdata_documents,
        inputs=[str(path) for path in sorted(folder.glob("*.ds"))],
        output_dir=str(folder / "litdata"),
        chunk_bytes="64MB",
        item_loader=TokensLoader(block_size=LENGTH + 1),
        num_workers=1,
        verbose=False,
    )


def run(name: str, folder: Path, batches: int) -> dict[str, float]:
    """One reader in a new process, on one thread but for its own."""
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "loader_contestants.py"), name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([*command, "--batches", str(batches)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make the files, let all readers take turns, write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--batches", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    try:
        make_data(folder, arguments.tokens)
        found = [{name: run(name, folder, arguments.batches) for name in CONTESTANTS} for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder)
    publish("loader", "Readers of tokens", [_table(found, arguments.tokens)], write=not arguments.dry, packages=PEERS)


def _table(found: list[dict[str, dict[str, float]]], num_tokens: int) -> Section:
    rates = {name: [round_[name]["tokens_per_cpu_second"] for round_ in found] for name in ROWS}
    limit = [ours / ram for ours, ram in zip(rates["ours_tokens"], rates["copy_in_ram"], strict=True)]
    peers = zip(rates["datatrove_positions"], rates["megatron_positions"], strict=True)
    ahead = [ours / max(pair) for ours, pair in zip(rates["ours"], peers, strict=True)]
    rows: list[tuple[str, ...]] = []
    for name, (reader, boundaries) in ROWS.items():
        start = median(round_[name]["start_seconds"] for round_ in found)
        memory = median(round_[name]["memory"] for round_ in found)
        rate = f"{median(rates[name]) / 1e6:.0f} ({min(rates[name]) / 1e6:.0f} to {max(rates[name]) / 1e6:.0f})"
        rows.append((reader, boundaries, rate, f"{1e3 * start:.1f}", f"{memory / 1e6:.1f}"))
    notes = (
        f"{num_tokens:,} tokens of 4 bytes in documents of {DOCUMENT_TOKENS} on average; batches of {BATCH} windows of "
        f"{LENGTH} tokens in random order, as 64-bit integers. Boundaries: loss mask and positions that restart at "
        "documents; LitData has none. Start: from construction to the first batch, in a process that has imported "
        "everything. Memory: what no file is behind, above that of the imports. Rates are the median (smallest to "
        f"largest) of {len(found)} processes, each the best of three stretches.\n\n"
        f"Ours without boundaries / the limit: {median(limit):.2f} ({min(limit):.2f} to {max(limit):.2f}). "
        f"Ours with boundaries / the best peer with them: {median(ahead):.1f} ({min(ahead):.1f} to {max(ahead):.1f})."
    )
    columns = ("reader", "boundaries", "million tokens per CPU-second", "start, ms", "memory, MB")
    return Section("Tokens per CPU-second, start and memory", columns, rows, notes)


if __name__ == "__main__":
    main()
