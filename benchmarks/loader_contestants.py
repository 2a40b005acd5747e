"""The readers that benchmarks/loader.py compares, each in a process of its own.

    python benchmarks/loader_contestants.py NAME FOLDER [--batches N]        prints one JSON object

All read the same tokens in batches of `BATCH` windows of `LENGTH` + 1 tokens, in an order that is shuffled by windows.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, BATCH = 4096, 8
VOCAB_SIZE, EOS = 100_000, 0
ROUNDS = 3

Reader = Callable[[int], Any]
"""Gives the tokens of batch i (from 0): [BATCH, LENGTH + 1], or the inputs alone where a reader has no windows."""


def copy_in_ram(folder: Path, batches: int) -> Reader:
    """The limit: rows of an array in memory, copied into one int64 array."""
    tokens = np.concatenate([np.fromfile(path, dtype=np.uint32) for path in sorted(folder.glob("*.ds"))])
    order = np.random.default_rng(1).permutation((len(tokens) - 1) // LENGTH)
    out = np.empty((BATCH, LENGTH + 1), dtype=np.int64)

    def read(batch: int) -> Any:
        for row in range(BATCH):
            start = int(order[(batch * BATCH + row) % len(order)]) * LENGTH
            out[row] = tokens[start : start + LENGTH + 1]
        return out

    return read


def ours_tokens(folder: Path, batches: int) -> Reader:
    """The plan of every step and its windows, without masks and positions."""
    from data.batch import StepBuffers
    from data.filling import read_tokens

    plan = _plan(folder, batches)
    buffers = StepBuffers.allocated(BATCH, LENGTH)

    def read(batch: int) -> Any:
        planned = plan.planned(batch + 1)
        read_tokens(buffers.tokens, planned, planned.pieces(slice(0, BATCH)), 0)
        return buffers.tokens

    return read


def ours(folder: Path, batches: int) -> Reader:
    """What a rank trains on: windows, masks and positions, in a ring of buffers."""
    from data.loader import DEPTH, RankBatches

    rank = RankBatches(_plan(folder, batches), dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=BATCH)
    return lambda batch: rank(batch + 1, batch % (DEPTH + 1)).micro_batches[0].tokens


def ours_ahead(folder: Path, batches: int) -> Reader:
    """The same, read ahead by one thread."""
    from data.loader import Prefetcher, RankBatches

    plan = _plan(folder, batches)
    rank = RankBatches(plan, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=BATCH, announce=True)
    loader = Prefetcher(rank, 1, 10**9)
    return lambda batch: next(loader).micro_batches[0].tokens


def datatrove_tokens(folder: Path, batches: int) -> Reader:
    """datatrove's dataset of a folder, windows in a random order, collated."""
    return _datatrove(folder, return_positions=False)


def datatrove_positions(folder: Path, batches: int) -> Reader:
    """The same with positions from the end-of-document token (from the index, random access takes seconds a batch)."""
    return _datatrove(folder, return_positions=True, positions_from_eos_token_id=EOS)


def megatron_tokens(folder: Path, batches: int) -> Reader:
    """Megatron-core's GPTDataset with the masks and positions of the first sample kept for all."""
    return _megatron(folder, batches, boundaries=False)


def megatron_positions(folder: Path, batches: int) -> Reader:
    """GPTDataset with position ids that restart at every document and its loss mask."""
    return _megatron(folder, batches, boundaries=True)


def litdata_tokens(folder: Path, batches: int) -> Reader:
    """LitData's StreamingDataset with its TokensLoader, shuffled, from local chunks."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=LENGTH + 1)
    dataset = StreamingDataset(str(folder / "litdata"), item_loader=loader, shuffle=True, seed=1, drop_last=True)
    state = {"items": iter(dataset)}

    def item() -> Any:
        try:
            return next(state["items"])
        except StopIteration:
            state["items"] = iter(dataset)
            return next(state["items"])

    return lambda batch: torch.stack([item().long() for _ in range(BATCH)])


CONTESTANTS: dict[str, Callable[[Path, int], Reader]] = {
    contestant.__name__: contestant
    for contestant in (
        copy_in_ram,
        ours_tokens,
        datatrove_tokens,
        megatron_tokens,
        litdata_tokens,
        ours,
        ours_ahead,
        datatrove_positions,
        megatron_positions,
    )
}


def _plan(folder: Path, batches: int) -> Any:
    from data.plan import DataPlan
    from nanotron_recipes.loading import recipe_from_mapping

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    dataset = {"dataset_folder": [str(folder)]}
    recipe = {
        "general": {"project": "bench-loader"},
        "model": {
            "dtype": "float32",
            "init_method": {"std": 0.02},
            "model_config": {
                **shape,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB_SIZE,
                "max_position_embeddings": LENGTH,
                "_use_doc_masking": True,
            },
        },
        "tokens": {"sequence_length": LENGTH, "global_batch_size": BATCH, "train_steps": batches},
        "data_stages": [{"name": "all", "start_training_step": 1, "data": {"dataset": dataset}}],
    }
    return DataPlan.from_recipe(recipe_from_mapping(recipe).recipe)


def _datatrove(folder: Path, **options: Any) -> Reader:
    import torch
    from datatrove.utils.dataset import DatatroveFolderDataset

    dataset = DatatroveFolderDataset(str(folder), LENGTH, recursive=False, token_size=4, **options)
    order = np.random.default_rng(1).permutation(len(dataset))

    def read(batch: int) -> Any:
        items = [dataset[int(order[(batch * BATCH + row) % len(order)])] for row in range(BATCH)]
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}["input_ids"]

    return read


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod = EOS
    pad = EOS
    vocab_size = VOCAB_SIZE
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def _megatron(folder: Path, batches: int, *, boundaries: bool) -> Reader:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "megatron" / "all")
    indexed = IndexedDataset(prefix, mmap=True)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=None,
        tokenizer=_Tokenizer(),
        reset_position_ids=boundaries,
        reset_attention_mask=False,
        eod_mask_loss=boundaries,
        create_attention_mask=False,
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, batches * BATCH, Split.train, config)

    def read(batch: int) -> Any:
        items = [dataset[(batch * BATCH + row) % len(dataset)] for row in range(BATCH)]
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}["tokens"]

    return read


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux tells what is anonymous"
    return 1024 * int(found[1])


def measure(name: str, folder: Path, batches: int) -> dict[str, float]:
    """Start a reader twice, the first time for its imports, and read from the second."""
    CONTESTANTS[name](folder, batches * (ROUNDS + 1))(0)
    before, begin = anonymous_bytes(), time.perf_counter()
    read = CONTESTANTS[name](folder, batches * (ROUNDS + 1))
    shape = tuple(read(0).shape)
    start_seconds = time.perf_counter() - begin
    assert shape[0] == BATCH and shape[1] in (LENGTH, LENGTH + 1), shape
    best, place = float("inf"), 1
    for _ in range(ROUNDS):
        begin = time.process_time()
        for batch in range(place, place + batches):
            read(batch)
        best = min(best, time.process_time() - begin)
        place += batches
    rate = batches * BATCH * LENGTH / best
    return {"tokens_per_cpu_second": rate, "start_seconds": start_seconds, "memory": anonymous_bytes() - before}


def main() -> None:
    """Measure one reader."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=512)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.name, arguments.folder, arguments.batches)))


if __name__ == "__main__":
    main()
