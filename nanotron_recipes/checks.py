"""What must hold between keys. Each check yields the problems that it finds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from nanotron_recipes.data_checks import data_problems
from nanotron_recipes.errors import nearest_name
from nanotron_recipes.model_checks import model_problems
from nanotron_recipes.paths import (
    LOCAL_PATHS,
    NODE_PATHS,
    ON_S3,
    REMOTE_IN_NANOTRON,
    TEXT_PATH,
    path_mistake,
    paths_of,
    s3_place,
    text_path_mistake,
)
from nanotron_recipes.problem import Problem, server_problems
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.urls import is_url
from nanotron_recipes.variables import broken_variables

LONGEST_SECONDS = 365 * 24 * 3600
"""What a timer is set to; the system's own take no more than some centuries."""
SLOWEST_MEGABYTES = 0.001
"""A second, for uploads: a part of 32 MB then takes nine hours."""
MAX_SKIPPED_AT_ONCE = 1_000_000
"""Batches that a run leaves out by itself: the range that it writes into its recipe is one that may stand there."""


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield everything in a recipe that cannot be, most basic first; how the batch is cut is `resolve_topology`'s."""
    yield from _variables(recipe)
    yield from model_problems(recipe)
    yield from data_problems(recipe)
    yield from _guards(recipe)
    yield from _upload(recipe)
    yield from _paths(recipe)
    yield from _misspelt_sources(recipe)


def _variables(recipe: Recipe) -> Iterator[Problem]:
    for key, text in broken_variables(recipe):
        expected = "expected ${NAME} and no default in it: section `variables`, else the environment, gives the value"
        yield Problem(key, text, expected)


def _guards(recipe: Recipe) -> Iterator[Problem]:
    timeout, skipped = recipe.guards.step_timeout_seconds, recipe.guards.rewind_skip_after
    if timeout is not None and timeout > LONGEST_SECONDS:
        expected = f"expected at most {LONGEST_SECONDS:,}, a year; null: no limit"
        yield Problem("guards.step_timeout_seconds", timeout, expected)
    if skipped > MAX_SKIPPED_AT_ONCE:
        yield Problem("guards.rewind_skip_after", skipped, f"expected at most {MAX_SKIPPED_AT_ONCE:,}")


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
    yield from server_problems("s3_upload.endpoint_url", server)


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


def _placeholder_mistake(path: str) -> str | None:
    odd = [word for word in re.findall(r"\{\w*\}", path) if word != "{node}"]
    return f"{odd[0]} has no meaning; only {{node}}, the name of the node, has" if odd else None


def _misspelt_sources(recipe: Recipe) -> Iterator[Problem]:
    """A name in dataset_folder that is no source and no folder, and nearly the name of a source."""
    sources = [source.name for source in recipe.corpus.sources] if recipe.corpus else []
    for key, name in paths_of(recipe, "data_stages.data.dataset.dataset_folder"):
        nearest = None if name in sources or "/" in name else nearest_name(name, sources)
        if nearest is not None and not os.path.isdir(name):
            yield Problem(key, name, "expected the name of a source in corpus, or a folder of shards", nearest)
