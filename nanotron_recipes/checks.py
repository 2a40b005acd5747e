"""What must hold between keys. Each check yields the problems that it finds."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import regex

from nanotron_recipes.errors import nearest_name
from nanotron_recipes.parameters import matches, parameter_names
from nanotron_recipes.paths import (
    LOCAL_PATHS,
    NODE_PATHS,
    ON_S3,
    REMOTE_IN_NANOTRON,
    TEXT_PATH,
    is_hub,
    path_mistake,
    paths_of,
    s3_place,
    text_path_mistake,
)
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import block_length, stage_sequence_length
from nanotron_recipes.topology import MAX_SIZE, divisors, next_multiple, padded_vocab_size
from nanotron_recipes.urls import is_url
from nanotron_recipes.variables import broken_variables

MAX_LAYERS = 10_000
"""Decoder layers that a recipe may ask for."""
LONGEST_SECONDS = 365 * 24 * 3600
"""What a timer is set to; the system's own take no more than some centuries."""
SLOWEST_MEGABYTES = 0.001
"""A second, for uploads: a part of 32 MB then takes nine hours."""
MAX_SKIPPED_AT_ONCE = 1_000_000
"""Batches that a run leaves out by itself: the range that it writes into its recipe is one that may stand there."""
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("make_vocab_size_divisible_by", "sequence_length", "global_batch_size", "micro_batch_size"),
    *("block_length", "contiguous_length"),
    *("batch_accumulation_per_replica", "dp", "pp", "tp", "context_parallel_size", "expert_parallel_size"),
)


@dataclass(frozen=True)
class Problem:
    """A key whose value does not fit the others, and what would."""

    key: str
    value: Any
    expected: str
    nearest: str | None = None
    """A name that was probably meant."""


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield everything in a recipe that cannot be, most basic first; how the batch is cut is `resolve_topology`'s."""
    yield from _variables(recipe)
    yield from _sizes(recipe)
    yield from _shape(recipe)
    yield from _tensor_parallel(recipe)
    yield from _pipeline(recipe)
    yield from _recomputation(recipe)
    yield from _stages(recipe)
    yield from _skipped_ranges(recipe)
    yield from _guards(recipe)
    yield from _upload(recipe)
    yield from _staging(recipe)
    yield from _weight_decay(recipe)
    yield from _tokenizer(recipe)
    yield from _corpus(recipe)
    yield from _paths(recipe)
    yield from _misspelt_sources(recipe)


def _variables(recipe: Recipe) -> Iterator[Problem]:
    for key, text in broken_variables(recipe):
        expected = "expected ${NAME} and no default in it: section `variables`, else the environment, gives the value"
        yield Problem(key, text, expected)


def _sizes(recipe: Recipe) -> Iterator[Problem]:
    """What no machine trains, and would take for ever to count or to divide up."""
    layers = recipe.model.architecture.num_hidden_layers
    if layers > MAX_LAYERS:
        yield Problem("model.model_config.num_hidden_layers", layers, f"expected at most {MAX_LAYERS:,}")
    for prefix, section in (
        ("model.model_config", recipe.model.architecture),
        ("model", recipe.model),
        ("tokens", recipe.tokens),
        ("parallelism", recipe.parallelism),
        *((f"data_stages.{index}", stage) for index, stage in enumerate(recipe.data_stages)),
    ):
        for name in _SIZES:
            size = getattr(section, name, None)
            if isinstance(size, int) and size > MAX_SIZE:
                yield Problem(f"{prefix}.{name}", size, f"expected at most {MAX_SIZE:,}")


def _shape(recipe: Recipe) -> Iterator[Problem]:
    architecture, key = recipe.model.architecture, "model.model_config"
    hidden, heads, groups = architecture.hidden_size, architecture.num_attention_heads, architecture.num_key_value_heads
    if hidden % heads:
        yield Problem(f"{key}.hidden_size", hidden, f"expected a multiple of num_attention_heads {heads}")
    elif (hidden // heads) % 2:
        yield Problem(f"{key}.hidden_size", hidden, f"expected an even width per head, not {hidden // heads}, for RoPE")
    if heads % groups:
        yield Problem(f"{key}.num_key_value_heads", groups, f"expected a divisor of num_attention_heads {heads}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(architecture, name)
        if token is not None and token >= architecture.vocab_size:
            yield Problem(f"{key}.{name}", token, f"expected less than vocab_size {architecture.vocab_size}")


def _tensor_parallel(recipe: Recipe) -> Iterator[Problem]:
    architecture, tp, key = recipe.model.architecture, recipe.parallelism.tp, "parallelism.tp"
    sizes = {
        name: getattr(architecture, name)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    for name, number in sizes.items():
        if number % tp:
            works = ", ".join(map(str, divisors(math.gcd(*sizes.values()))))
            yield Problem(key, tp, f"does not divide {name} {number}; expected one of {works}")
    rows = padded_vocab_size(recipe)
    if rows % tp:
        multiple = next_multiple(recipe.model.make_vocab_size_divisible_by, tp)
        yield Problem(
            key,
            tp,
            f"does not divide the padded vocabulary {rows}; set model.make_vocab_size_divisible_by to {multiple} "
            f"(rows: {next_multiple(architecture.vocab_size, multiple)})",
        )
    if recipe.parallelism.tp_mode == "REDUCE_SCATTER":
        lengths = {"tokens.sequence_length": recipe.tokens.sequence_length}
        for index, stage in enumerate(recipe.data_stages):
            lengths[f"data_stages.{index}.sequence_length"] = stage_sequence_length(recipe, stage)
        for key, length in lengths.items():
            if length % tp:
                yield Problem(key, length, f"expected a multiple of tp {tp} in tp_mode REDUCE_SCATTER")


def _pipeline(recipe: Recipe) -> Iterator[Problem]:
    layers, pp = recipe.model.architecture.num_hidden_layers, recipe.parallelism.pp
    if pp > layers:
        yield Problem("parallelism.pp", pp, f"expected at most num_hidden_layers {layers}")


def _recomputation(recipe: Recipe) -> Iterator[Problem]:
    recompute, whole_layer = recipe.parallelism.recompute, recipe.parallelism.recompute_layer
    if (recompute == "full") != whole_layer:
        expected = f"expected to agree with recompute_layer {str(whole_layer).lower()}; leave one of them out"
        yield Problem("parallelism.recompute", recompute, expected)


def _of_a_branch(recipe: Recipe) -> str:
    """What somebody has to know who gives a run that goes on from another's checkpoint its new stage alone."""
    checkpoints = recipe.checkpoints
    if checkpoints.resume_checkpoint_path is None or not checkpoints.load_lr_scheduler:
        return ""
    return "; a run that goes on from resume_checkpoint_path keeps its parent's stages before its own"


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


def _blocks(recipe: Recipe) -> Iterator[Problem]:
    block, together = block_length(recipe), recipe.tokens.contiguous_length
    if together is not None and together % block:
        yield Problem("tokens.contiguous_length", together, f"expected a multiple of the block_length {block}")
    for index, stage in enumerate(recipe.data_stages):
        length = stage_sequence_length(recipe, stage)
        if length % block:
            key = "tokens" if stage.sequence_length is None else f"data_stages.{index}"
            yield Problem(f"{key}.sequence_length", length, f"expected a multiple of tokens.block_length {block}")


def _upload(recipe: Recipe) -> Iterator[Problem]:
    upload = recipe.s3_upload
    if upload is None:
        return
    url, server, speed = upload.upload_s3_path, upload.endpoint_url, upload.max_megabytes_per_second
    if speed is not None and speed < SLOWEST_MEGABYTES:
        expected = f"expected at least {SLOWEST_MEGABYTES}; null: as fast as it goes"
        yield Problem("s3_upload.max_megabytes_per_second", speed, expected)
    if url is not None and s3_place(url) is None and "${" not in url:
        yield Problem("s3_upload.upload_s3_path", url, "expected s3://bucket/prefix")
    yield from _server("s3_upload.endpoint_url", server)


def _server(key: str, url: str | None) -> Iterator[Problem]:
    """What is wrong with an endpoint. What may be a secret is not shown."""
    if url is None or "${" in url:
        return
    if re.match(r"[^/]*//[^/]*@|[^?#]*[?#]", url):
        expected = "expected no user, query or fragment in it: credentials are those of AWS's own configuration"
        yield Problem(key, "(hidden)", expected)
    elif not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) or not _has_port(url):
        yield Problem(key, url, "expected http:// or https://, a server, and perhaps a port up to 65535")


def _has_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _staging(recipe: Recipe) -> Iterator[Problem]:
    yield from _server("data_staging.endpoint_url", recipe.data_staging.endpoint_url)
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


def _skipped_ranges(recipe: Recipe) -> Iterator[Problem]:
    for index, skipped in enumerate(recipe.data_skipped_ranges):
        if skipped.end > MAX_SIZE:
            yield Problem(f"data_skipped_ranges.{index}.end", skipped.end, f"expected at most {MAX_SIZE:,}")
        if skipped.end <= skipped.first:
            expected = f"expected more than first {skipped.first}: the batch after the last skipped one"
            yield Problem(f"data_skipped_ranges.{index}.end", skipped.end, expected)


def _guards(recipe: Recipe) -> Iterator[Problem]:
    timeout, skipped = recipe.guards.step_timeout_seconds, recipe.guards.rewind_skip_after
    if timeout is not None and timeout > LONGEST_SECONDS:
        expected = f"expected at most {LONGEST_SECONDS:,}, a year; null: no limit"
        yield Problem("guards.step_timeout_seconds", timeout, expected)
    if skipped > MAX_SKIPPED_AT_ONCE:
        yield Problem("guards.rewind_skip_after", skipped, f"expected at most {MAX_SKIPPED_AT_ONCE:,}")


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


def _weight_decay(recipe: Recipe) -> Iterator[Problem]:
    names = parameter_names(recipe)
    for index, pattern in enumerate(recipe.optimizer.weight_decay_exclude_named_params):
        key = f"optimizer.weight_decay_exclude_named_params.{index}"
        try:
            matched = any(matches(pattern, name) for name in names)
        except (regex.error, RecursionError, OverflowError) as error:
            yield Problem(key, pattern, f"expected a regular expression: {error}")
            continue
        except TimeoutError:
            yield Problem(key, pattern, "expected a regular expression that does not go on for ever")
            continue
        if not matched:
            yield Problem(key, pattern, f"matches no parameter; they are named like {names[0]}, {names[1]}")


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


def _misspelt_sources(recipe: Recipe) -> Iterator[Problem]:
    """A name in dataset_folder that is no source and no folder, and nearly the name of a source."""
    sources = [source.name for source in recipe.corpus.sources] if recipe.corpus else []
    for key, name in paths_of(recipe, "data_stages.data.dataset.dataset_folder"):
        nearest = None if name in sources or "/" in name else nearest_name(name, sources)
        if nearest is not None and not os.path.isdir(name):
            yield Problem(key, name, "expected the name of a source in corpus, or a folder of shards", nearest)


def _placeholder_mistake(path: str) -> str | None:
    odd = [word for word in re.findall(r"\{\w*\}", path) if word != "{node}"]
    return f"{odd[0]} has no meaning; only {{node}}, the name of the node, has" if odd else None


def _paths(recipe: Recipe) -> Iterator[Problem]:
    for name in LOCAL_PATHS:
        may_be_remote = name in REMOTE_IN_NANOTRON and recipe.s3_upload is not None
        for key, path in paths_of(recipe, name):
            mistake = text_path_mistake(path) if name == TEXT_PATH else path_mistake(path)
            if name in NODE_PATHS and mistake is None:
                mistake = _placeholder_mistake(path)
            if name in ON_S3 and is_url(path):
                mistake = (
                    None if s3_place(path) or "${" in path else "expected a path of this machine, or s3://bucket/prefix"
                )
            if mistake is not None and not (may_be_remote and is_url(path)):
                yield Problem(key, path, mistake)
