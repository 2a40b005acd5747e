"""Small sources and recipes for the tests of `data`: shards written by hand, and text to tokenize."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest, ShardFile, Split, write_manifest
from data.plan import DataPlan
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.recipe import Recipe

WORDS = ["the", "of", "to", "in", "we", "red", "green", "blue", "stone", "river", "window", "number", "a", "if"]


def write_shard(folder: Path, name: str, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> ShardFile:
    """Writes documents as a `.ds` file with its index."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.array([token for document in documents for token in document], dtype=dtype)
    ends = np.cumsum([len(document) for document in documents], dtype=np.uint64)
    path.write_bytes(tokens.tobytes())
    path.with_name(path.name + ".index").write_bytes(ends.tobytes())
    return ShardFile(
        name=name,
        size=tokens.nbytes,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        index_sha256=hashlib.sha256(ends.tobytes()).hexdigest(),
        tokens=len(tokens),
        documents=len(documents),
    )


def write_source(folder: Path, files: Sequence[Sequence[Any]], vocab_size: int = 1000) -> Manifest:
    """Writes a source whose training files hold these documents; the first file is its validation text, too."""
    shards = tuple(write_shard(folder, f"{i:05d}.ds", documents) for i, documents in enumerate(files))
    held_out = write_shard(folder, "validation/00000.ds", files[0])
    manifest = Manifest(
        source=folder.name,
        dtype="uint16",
        vocab_size=vocab_size,
        eos_token_id=0,
        tokenizer_sha256="0" * 64,
        settings_sha256="0" * 64,
        train=Split(files=shards, text_bytes=100),
        validation=Split(files=(held_out,), text_bytes=100),
    )
    write_manifest(folder, manifest)
    return manifest


def random_documents(seed: int, count: int, longest: int, vocab_size: int = 1000) -> list[list[int]]:
    """Documents of 1 … longest tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, generator.integers(1, longest + 1)).tolist() for _ in range(count)]


def recipe_with(
    stages: Sequence[tuple[int, dict[str, float]]],
    *,
    sequence_length: int = 8,
    global_batch_size: int = 12,
    train_steps: int = 60,
    vocab_size: int = 1000,
    lengths: Sequence[int | None] = (),
    tokens: dict[str, Any] | None = None,
    **sections: Any,
) -> Recipe:
    """A recipe that reads sources (folder: weight) in stages (first step, sources), each with its sequence length."""
    mapping = {
        "general": {"project": "tests", "seed": 1},
        "model": {
            "dtype": "float32",
            "init_method": {"std": 0.1},
            "model_config": {
                "vocab_size": vocab_size,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": sequence_length,
                "_use_doc_masking": True,
            },
        },
        "tokens": {
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "micro_batch_size": "auto",
            "train_steps": train_steps,
            **(tokens or {}),
        },
        "data_stages": [
            {
                "name": f"stage {number}",
                "start_training_step": first,
                "sequence_length": lengths[number] if number < len(lengths) else None,
                "data": {
                    "seed": 5 + number,
                    "dataset": {"dataset_folder": list(sources), "dataset_weights": list(sources.values())},
                },
            }
            for number, (first, sources) in enumerate(stages)
        ],
        **sections,
    }
    return recipe_from_mapping(mapping, source="test").recipe


def train_tokens(plan: DataPlan) -> dict[str, int]:
    """By source, the tokens that its manifest says it has."""
    return {name: source.manifest.train.tokens for name, source in plan.sources.items()}


def write_jsonl(path: Path, count: int, key: str = "text", seed: int = 0) -> None:
    """Writes `count` documents of random words."""
    generator = np.random.default_rng(seed)
    lines = [
        json.dumps({key: " ".join(generator.choice(WORDS, generator.integers(5, 60))), "number": i})
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def corpus_recipe(folder: Path, sources: list[dict[str, Any]], vocab_size: int = 300, **corpus: Any) -> Recipe:
    """A recipe with a corpus in `folder` that trains a tokenizer and reads every source."""
    return recipe_with(
        [(1, {source["name"]: 1.0 for source in sources})],
        vocab_size=vocab_size,
        corpus={"path": str(folder), "sources": sources, **corpus},
        tokenizer={"train": {"vocab_size": vocab_size}},
    )
