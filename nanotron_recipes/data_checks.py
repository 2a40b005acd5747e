"""What must hold between the keys of the data: stages, mixtures, corpus, tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nanotron_recipes.paths import is_hub, s3_place
from nanotron_recipes.problem import Problem, server_problems
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import block_length, stage_sequence_length
from nanotron_recipes.topology import MAX_SIZE


def data_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be, most basic first."""
    yield from _stages(recipe)
    yield from _skipped_ranges(recipe)
    yield from _staging(recipe)
    yield from _tokenizer(recipe)
    yield from _corpus(recipe)


def _stages(recipe: Recipe) -> Iterator[Problem]:
    previous = 0
    yield from _blocks(recipe)
    for index, stage in enumerate(recipe.data_stages):
        key, start = f"data_stages.{index}", stage.start_training_step
        if index == 0 and start != 1:
            yield Problem(f"{key}.start_training_step", start, f"expected 1 for the first stage{_of_a_branch(recipe)}")
        if start <= previous:
            yield Problem(f"{key}.start_training_step", start, f"expected more than the stage before it, {previous}")
        previous = start
        yield from _mixture(recipe, f"{key}.data.dataset", index)


def _of_a_branch(recipe: Recipe) -> str:
    """What somebody has to know who gives a run that goes on from another's checkpoint its new stage alone."""
    checkpoints = recipe.checkpoints
    if checkpoints.resume_checkpoint_path is None or not checkpoints.load_lr_scheduler:
        return ""
    return "; a run that goes on from resume_checkpoint_path keeps its parent's stages before its own"


def _blocks(recipe: Recipe) -> Iterator[Problem]:
    block, together = block_length(recipe), recipe.tokens.contiguous_length
    if together is not None and together % block:
        yield Problem("tokens.contiguous_length", together, f"expected a multiple of the block_length {block}")
    for index, stage in enumerate(recipe.data_stages):
        length = stage_sequence_length(recipe, stage)
        if length % block:
            key = "tokens" if stage.sequence_length is None else f"data_stages.{index}"
            yield Problem(f"{key}.sequence_length", length, f"expected a multiple of tokens.block_length {block}")


def _mixture(recipe: Recipe, key: str, index: int) -> Iterator[Problem]:
    dataset = recipe.data_stages[index].data.dataset
    folders, weights = dataset.dataset_folder, dataset.dataset_weights
    repeated = next((folder for folder in folders if folders.count(folder) > 1), None)
    if repeated is not None:
        yield Problem(f"{key}.dataset_folder", repeated, "expected each folder once; add up its weights")
    if weights is not None and len(weights) != len(folders):
        expected = f"expected {len(folders)} weights, one for each dataset_folder"
        yield Problem(f"{key}.dataset_weights", len(weights), expected)
    if weights is not None and not 0 < sum(weights) < math.inf:
        yield Problem(f"{key}.dataset_weights", weights, "expected at least one weight above 0, and a finite sum")
    vocabulary = recipe.model.architecture.vocab_size
    tokenized = dataset.vocab_size or vocabulary
    if dataset.token_size_in_bytes == 2 and tokenized > 2**16:
        yield Problem(f"{key}.token_size_in_bytes", 2, f"expected 4 for a vocab_size of {tokenized}")
    if dataset.vocab_size is not None and dataset.vocab_size > vocabulary:
        yield Problem(f"{key}.vocab_size", dataset.vocab_size, f"expected at most the model's vocab_size {vocabulary}")


def _skipped_ranges(recipe: Recipe) -> Iterator[Problem]:
    for index, skipped in enumerate(recipe.data_skipped_ranges):
        if skipped.end > MAX_SIZE:
            yield Problem(f"data_skipped_ranges.{index}.end", skipped.end, f"expected at most {MAX_SIZE:,}")
        if skipped.end <= skipped.first:
            expected = f"expected more than first {skipped.first}: the batch after the last skipped one"
            yield Problem(f"data_skipped_ranges.{index}.end", skipped.end, expected)


def _staging(recipe: Recipe) -> Iterator[Problem]:
    yield from server_problems("data_staging.endpoint_url", recipe.data_staging.endpoint_url)
    read_from: dict[str, str] = {}
    for index, stage in enumerate(recipe.data_stages):
        folders, key = stage.data.dataset.dataset_folder, f"data_stages.{index}.data.dataset.dataset_read_path"
        paths = stage.data.dataset.dataset_read_path
        if paths is not None and len(paths) != len(folders):
            yield Problem(key, len(paths), f"expected {len(folders)} paths, one for each dataset_folder")
        for number, (folder, path) in enumerate(zip(folders, paths or [], strict=False)):
            if read_from.setdefault(folder, path) != path:
                yield Problem(f"{key}.{number}", path, f"expected {read_from[folder]}, as in an earlier stage")
    for path in read_from.values():
        sharing = [folder for folder, other in read_from.items() if other == path]
        if len(sharing) > 1:
            yield Problem("data_stages dataset_read_path", path, f"expected a place for each of {', '.join(sharing)}")
            return


def _tokenizer(recipe: Recipe) -> Iterator[Problem]:
    tokenizer, vocabulary = recipe.tokenizer, recipe.model.architecture.vocab_size
    if tokenizer.train is None:
        return
    if tokenizer.tokenizer_name_or_path is not None:
        name = tokenizer.tokenizer_name_or_path
        yield Problem("tokenizer.tokenizer_name_or_path", name, "expected null where tokenizer.train is set")
    if recipe.corpus is None:
        yield Problem("tokenizer.train.vocab_size", tokenizer.train.vocab_size, "expected a corpus to train it on")
    if tokenizer.train.vocab_size > vocabulary:
        expected = f"expected at most model.model_config.vocab_size {vocabulary}"
        yield Problem("tokenizer.train.vocab_size", tokenizer.train.vocab_size, expected)


def _corpus(recipe: Recipe) -> Iterator[Problem]:
    names: set[str] = set()
    upload_to = recipe.corpus.upload_to if recipe.corpus else None
    if upload_to is not None and s3_place(upload_to) is None and "${" not in upload_to:
        yield Problem("corpus.upload_to", upload_to, "expected s3://bucket/prefix")
    for index, source in enumerate(recipe.corpus.sources if recipe.corpus else []):
        key = f"corpus.sources.{index}"
        if source.name in names or source.name in ("tokenizer", "tokenizer.settings"):
            yield Problem(f"{key}.name", source.name, "expected a name of its own, other than 'tokenizer'")
        names.add(source.name)
        if source.reader in ("jsonl", "parquet", "text") and source.path is None:
            yield Problem(f"{key}.path", None, f"expected the file or folder that reader {source.reader} reads")
        yield from _revision(key, source.path, source.revision)


def _revision(key: str, path: str | None, revision: str | None) -> Iterator[Problem]:
    is_needed = path is not None and is_hub(path)
    if is_needed and not revision:
        yield Problem(f"{key}.revision", revision, f"expected the commit, tag or branch of {path} to read")
    if not is_needed and revision is not None:
        yield Problem(f"{key}.revision", revision, "expected null: only an hf:// path has a revision")
