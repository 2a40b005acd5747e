"""From a checkpoint to a Hugging Face folder that plain transformers loads, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from model.arithmetic import num_parameters
from model.hf_files import MAX_SHARD_BYTES, SafetensorsWriter
from model.hf_folder import (
    copy_tokenizer,
    load_with_transformers,
    tokenizer_token_ids,
    tokenizer_vocab_size,
)
from model.hf_mapping import TokenIds, hf_class, hf_config, hf_shapes, parameter_map, split_to_hf, token_ids_of
from model.lineage import write_lineage
from model.model_card import facts_from_recipe, render_card
from model.whole_folder import check_replaceable, whole_folder
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch

MARKER = "nanotron_recipes.json"
"""File that marks a folder as an export of ours, and lists its files: a later export may replace these."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    out: Path
    hf_class: str
    """The transformers class, e.g. "SmolLM3ForCausalLM"."""
    num_parameters: int
    dtype: str
    weight_files: list[str]
    weight_bytes: int
    tokenizer_files: list[str]
    """Empty when no tokenizer was at hand: the folder then loads as a model only."""


def export_checkpoint(
    checkpoint: Path, out: Path, *, tokenizer_dir: Path | None = None, card: str | None = None
) -> ExportReport:
    """Write the checkpoint folder `checkpoint` (one step) as the Hugging Face folder `out`.

    `tokenizer_dir`: a folder whose tokenizer is copied in. `card`: the README.md; None: one made from the recipe.
    `out` appears whole or not at all; an earlier export there is replaced. Raises UserError where `out` holds
    anything else, the model has no Hugging Face class, or the tokenizer does not fit the vocabulary.
    """
    from parallel.checkpoint import read_tensors
    from parallel.checkpoint_files import read_manifest

    recipe, manifest = checkpoint_recipe(checkpoint), read_manifest(checkpoint)
    return export_tensors(
        read_tensors(checkpoint),
        recipe,
        out,
        tokenizer_dir=tokenizer_dir,
        card=card,
        step=manifest.step or None,
        data_fingerprint=manifest.data or None,
    )


def checkpoint_recipe(checkpoint: Path) -> Recipe:
    """The resolved recipe that a checkpoint folder holds; UserError when it has none."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{checkpoint}: no recipe.yaml here; expected the folder of a step, <run>/checkpoints/<step>")
    return load_recipe(str(path)).recipe


def export_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    recipe: Recipe,
    out: Path,
    *,
    tokenizer_dir: Path | None = None,
    card: str | None = None,
    step: int | None = None,
    data_fingerprint: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportReport:
    """`export_checkpoint` from global tensors by our names, in any order; their dtype is kept (all must have one).

    `data_fingerprint`: of the data that they were trained on, for the lineage; None where nobody knows.
    """
    name = hf_class(recipe)
    token_ids = _token_ids(recipe, tokenizer_dir)
    with whole_folder(out, own_files=exported_files) as folder:
        writer, dtype = _write_weights(folder, tensors, recipe, max_shard_bytes)
        config = hf_config(recipe, dtype=dtype, token_ids=token_ids, transformers_version=version("transformers"))
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "config.json", config)
        _write_json(
            folder / "generation_config.json",
            {key: value for key, value in generation.items() if value is not None}
            | {"transformers_version": config["transformers_version"]},
        )
        copied = copy_tokenizer(tokenizer_dir, folder) if tokenizer_dir else []
        facts = replace(facts_from_recipe(recipe, name=out.name, step=step), has_tokenizer=bool(copied))
        (folder / "README.md").write_text(card or render_card(facts), encoding="utf-8")
        write_lineage(folder, recipe, data_fingerprint)
        files = sorted([MARKER, *(path.name for path in folder.iterdir())])
        _write_json(folder / MARKER, {"class": name, "step": step, "files": files})
    return ExportReport(out, name, num_parameters(recipe), dtype, writer.files, writer.total_bytes, copied)


def check_export_target(out: Path) -> None:
    """Raise UserError where an export to `out` would be refused for what is there; `export_checkpoint` does so too."""
    check_replaceable(out, exported_files)


def exported_files(folder: Path) -> set[str]:
    """Names of the files that an export of ours wrote into a folder; none where no export did, or nobody knows."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {str(name) for name in files}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def exported_step(folder: Path) -> int | None:
    """The step whose weights an export of ours holds; None where it says none."""
    try:
        step = json.loads((folder / MARKER).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _token_ids(recipe: Recipe, tokenizer_dir: Path | None) -> TokenIds:
    if tokenizer_dir is None:
        return token_ids_of(recipe)
    size, expected = tokenizer_vocab_size(tokenizer_dir), recipe.model.architecture.vocab_size
    if size is not None and size > expected:
        raise UserError(
            f"{tokenizer_dir}: the tokenizer has token ids up to {size - 1}, "
            f"expected fewer than model.model_config.vocab_size: {expected}"
        )
    return token_ids_of(recipe, tokenizer_token_ids(tokenizer_dir))


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], recipe: Recipe, max_shard_bytes: int
) -> tuple[SafetensorsWriter, str]:
    entries = {entry.name: entry for entry in parameter_map(recipe)}
    writer, dtype = None, ""
    try:
        for name, tensor in tensors:
            if name not in entries:
                raise UserError(f"the checkpoint holds {name}, which the model of its recipe.yaml does not have")
            if writer is None:
                dtype = str(tensor.dtype).removeprefix("torch.")
                writer = SafetensorsWriter(folder, hf_shapes(recipe), dtype, max_shard_bytes)
            for hf_name, piece in split_to_hf(entries[name], tensor):
                writer.write(hf_name, piece)
        if writer is None:
            raise UserError("the checkpoint holds no model tensors")
        writer.close()
    finally:
        if writer is not None:
            writer.abandon()
    return writer, dtype


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def verify_export(
    out: Path,
    our_logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> float:
    """Largest absolute difference between our logits and those of transformers' model loaded from `out`.

    `our_logits`: int64 [batch, sequence] -> floating [batch, sequence, >= vocab_size]; it is called before the other
    model is loaded, so that the two need not fit in memory together. `token_ids`: int64 [batch, sequence], without
    padding. `dtype`: what transformers computes in (default float32). In float32 expect less than 1e-4.
    """
    import torch

    with torch.inference_mode():
        ours = our_logits(token_ids)
        theirs = load_with_transformers(out, dtype or torch.float32)
        expected = theirs(input_ids=token_ids, use_cache=False).logits.float()
        return (ours[..., : expected.shape[-1]].float() - expected).abs().max().item()
