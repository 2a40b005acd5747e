"""`training_lineage.json` of an export: the first of the stages that a model goes through, and the hash of its weights.

    {"format": 1, "stages": [{"stage", "parent", "config", "data_fingerprint", "versions", "weights_sha256"}]}

Post-training adds a stage each time it trains, and refuses weights that are not those of the last stage.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nanotron_recipes.code_version import code_version
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe

LINEAGE_FILE = "training_lineage.json"
FORMAT = 1
STAGE = "pretrain"

_PACKAGES = ("nanotron", "torch", "datatrove")


def weights_sha256(folder: Path) -> str:
    """One hash for the weights of a folder: the sha256 of the lines `<sha256>  <file>` over all its *.safetensors.

    The lines are sorted by file name and end in a newline each, as `sha256sum *.safetensors` prints them.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.name)
    lines = "".join(f"{_file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def write_lineage(folder: Path, recipe: Recipe, data_fingerprint: str | None) -> None:
    """Start the lineage of the export `folder`, whose weights are in place.

    `data_fingerprint`: of the data that was trained on; None where nobody knows.
    """
    stage: dict[str, Any] = {
        "stage": STAGE,
        "parent": None,
        "config": recipe.model_dump(mode="json", by_alias=True),
        "data_fingerprint": data_fingerprint,
        "versions": _versions(),
        "weights_sha256": weights_sha256(folder),
    }
    content = {"format": FORMAT, "stages": [stage]}
    write_atomic(folder / LINEAGE_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    found = {"nanotron-recipes": code_version(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
