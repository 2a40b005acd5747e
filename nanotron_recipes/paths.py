"""The files and folders that a recipe names: `~` is a home folder; text and shards may lie on S3, text on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from nanotron_recipes.fields import keys_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import Section
from nanotron_recipes.urls import is_url

NODE_PATHS = ("checkpoints.checkpoints_path", "checkpoints.resume_checkpoint_path")
"""Those in which `{node}` stands for the name of a node."""

LOCAL_PATHS = (
    "checkpoints.checkpoints_path",
    "checkpoints.resume_checkpoint_path",
    "corpus.path",
    "corpus.sources.path",
    "data_stages.data.dataset.dataset_folder",
    "data_stages.data.dataset.dataset_read_path",
    "data_staging.path",
    "data_staging.s5cmd_path",
    "profiler.profiler_export_path",
    "tokenizer.tokenizer_name_or_path",
)
"""Keys that hold a path, or a list of paths, without the indices of lists."""

REMOTE_IN_NANOTRON = ("checkpoints.resume_checkpoint_path",)
"""Those of them that a file with an `s3_upload` may give as URLs, as the published ones do; not available yet."""

TEXT_PATH = "corpus.sources.path"
"""The one of them that may be a URL anywhere: text is read from S3 and from the hub, too."""

_TEXT_URL = re.compile(r"s3://[^/]+(/.*)?|hf://datasets/[^/@]+/[^/@]+(/.*)?")
ON_S3 = ("data_stages.data.dataset.dataset_folder",)
"""Those of them that may be s3://bucket/prefix."""

_S3 = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9.-]+)/(?P<prefix>[^/].*)")


def with_home(recipe: Recipe) -> Recipe:
    """Return the recipe with `~` and `~user` at the start of its paths replaced by the home folder."""
    for key in LOCAL_PATHS:
        recipe = _expanded(recipe, key.split("."))
    return recipe


def path_mistake(path: str) -> str | None:
    """What was expected instead of `path`, after `with_home`; None where it can be a path of this machine."""
    if not path:
        return "expected a path"
    if is_url(path):
        return "expected a path of this machine, not a URL"
    if "\0" in path:
        return "expected a path; no file's name holds a NUL"
    if path.startswith("~"):
        return f"this home folder is not known; ./{path} is a folder of that name"
    return None


def text_path_mistake(path: str) -> str | None:
    """What was expected instead of a text's `path`; None where it can be one."""
    if not is_url(path):
        return path_mistake(path)
    if _TEXT_URL.fullmatch(path) and "\0" not in path:
        return None
    return "expected a path of this machine, s3://bucket/folder or hf://datasets/owner/name"


def is_hub(path: str) -> bool:
    """Return whether a path is that of a data set of the hub."""
    return path.startswith("hf://")


def s3_place(url: str) -> tuple[str, str] | None:
    """Return bucket and prefix (without a slash at its end) of s3://bucket/prefix; None where it is none."""
    found = _S3.fullmatch(url)
    return (found["bucket"], found["prefix"].rstrip("/")) if found else None


def paths_of(recipe: Recipe, key: str) -> Iterator[tuple[str, str]]:
    """Yield the paths under an entry of `LOCAL_PATHS` with their dotted keys, the indices of lists included."""
    yield from _strings(recipe, key.split("."), "")


def _strings(value: Any, path: list[str], prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _strings(entry, path, f"{prefix}.{index}")
    elif isinstance(value, Section):
        yield from _strings(getattr(value, _attribute(value, path[0])), path[1:], f"{prefix}.{path[0]}")
    elif isinstance(value, str):
        yield prefix.removeprefix("."), value


def _expanded(value: Any, path: list[str]) -> Any:
    if isinstance(value, list):
        return [_expanded(entry, path) for entry in value]
    if isinstance(value, Section):
        attribute = _attribute(value, path[0])
        before = getattr(value, attribute)
        after = _expanded(before, path[1:])
        return value if after == before else value.model_copy(update={attribute: after})
    return os.path.expanduser(value) if isinstance(value, str) else value


def _attribute(section: Section, name: str) -> str:
    return keys_of(type(section))[name].attribute
