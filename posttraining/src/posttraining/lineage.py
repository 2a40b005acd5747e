"""`training_lineage.json`: which stages the weights beside it have gone through.

    {"format": 1, "stages": [{"stage", "parent", "config", "data_fingerprint", "versions", "weights_sha256"}, …]}

A stage's `parent` is the `weights_sha256` it started from (null for pretraining, a list for a merge), so the chain can
be checked without any path. A stage that the guard was told to let pass has `forced`, the reason given.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, mistake
from posttraining.files import file_sha256, reading, write_whole

FILE = "training_lineage.json"
FORMAT = 1
PACKAGES = ("posttraining", "trl", "transformers", "torch", "accelerate", "datasets")
"""Whose versions an entry records, where installed."""

Stage = dict[str, Any]


def weights_sha256(folder: Path) -> str:
    """One hash for the weights of a folder: the sha256 of the lines `<sha256>  <file>` over all its *.safetensors.

    The lines are sorted by file name and end in a newline each, as `sha256sum *.safetensors` prints them. Raises
    Mistake where there are none.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.name)
    if not files:
        raise mistake(folder, None, NO_VALUE, "no *.safetensors file; expected a folder with weights")
    with reading(folder):
        lines = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read(folder: Path) -> list[Stage] | None:
    """The stages that `folder`'s lineage names, oldest first; None where it has no such file.

    Raises Mistake where the file is not a lineage of this format.
    """
    path = folder / FILE
    with reading(path):
        if not path.is_file():
            return None
        text = path.read_bytes()
    try:
        content = json.loads(text)
        stages = content["stages"]
        known = content["format"] == FORMAT and all(
            isinstance(stage["stage"], str) and isinstance(stage["weights_sha256"], str) for stage in stages
        )
    except (ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise mistake(path, None, NO_VALUE, f"not a lineage of format {FORMAT}")
    return list(stages)


def append(
    folder: Path,
    parents: Path | list[Path],
    stage: str,
    config: Mapping[str, Any],
    data_fingerprint: str | None,
    *,
    forced: str | None = None,
) -> None:
    """Write the lineage of `folder`, whose weights are in place: that of its parent or parents, and this stage.

    `config`: what the stage was told, as its file and --set say it. `forced`: the reason given to a guard that would
    have refused the parent. Stages that several parents share are kept once.
    """
    folders = parents if isinstance(parents, list) else [parents]
    stages: list[Stage] = []
    for parent in folders:
        stages += [entry for entry in read(parent) or [] if entry not in stages]
    hashes = [weights_sha256(parent) for parent in folders]
    entry: Stage = {
        "stage": stage,
        "parent": hashes if isinstance(parents, list) else hashes[0],
        "config": dict(config),
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "weights_sha256": weights_sha256(folder),
    }
    if forced:
        entry["forced"] = forced
    content = {"format": FORMAT, "stages": [*stages, entry]}
    write_whole(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def stage_names(folder: Path) -> list[str]:
    """The names of the stages in `folder`'s lineage, oldest first; empty where it has none."""
    return [stage["stage"] for stage in read(folder) or []]


def matches_weights(folder: Path) -> bool:
    """Whether the last stage of `folder`'s lineage wrote the weights that are there."""
    stages = read(folder) or []
    return bool(stages) and stages[-1]["weights_sha256"] == weights_sha256(folder)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a stage computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
