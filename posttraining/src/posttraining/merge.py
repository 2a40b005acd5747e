"""Merging models of one family: their weights' average, or a weighted mean.

    posttraining merge tiny --set 'models=[{model: grpo, weight: 0.9}, {model: sft, weight: 0.1}]' --set output_dir=mix

SmolLM3 was shipped as two of these: a soup of all APO checkpoints, then 0.9 of it and 0.1 of a long-context
mid-training checkpoint, which brought back the long contexts that reasoning and preference training had cost.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttraining import lineage
from posttraining.errors import NO_VALUE, StageFailed, mistake
from posttraining.files import reading, whole_folder
from posttraining.model_folder import check_finite, check_model_folder, find_not_finite, load_model
from posttraining.next_line import free_folder, stage_command
from posttraining.settings import load

STAGE = "merge"

_COPIED = ("config.json", "generation_config.json", "*token*", "chat_template*", "vocab*", "merges.txt")
"""What says how the weights are used; a card, a log and a lineage are about one parent alone."""


@dataclass(frozen=True)
class MergeParent:
    """One model of a merge."""

    model: str
    """Its folder, in Hugging Face form."""
    weight: float | None = None
    """Its share in a linear merge, where all shares add up to 1; null in a soup."""


@dataclass(kw_only=True)
class MergeSettings:
    """Keys of merge.yaml."""

    models: list[MergeParent]
    """At least two. The first gives the tokenizer, the settings, the dtypes and the layout of the files."""
    method: Literal["linear", "soup"] = "linear"
    """linear: the sum of weight times model; soup: the plain average (arXiv 2203.05482)."""
    output_dir: str
    """The folder to write."""


def run(config: str, overrides: Sequence[str] = ()) -> str:
    """Merge what the config names into its `output_dir`. Returns what to call next.

    Raises Mistake where the models cannot be read or do not fit together; StageFailed where their mean is not finite.
    """
    from posttraining.weights_average import write_average

    (settings,), mapping = load(config, STAGE, (MergeSettings,), overrides)
    folders, weights = [Path(parent.model) for parent in settings.models], _weights(settings, config)
    for folder in folders:
        check_model_folder(folder)
        _check_lineage(folder)
        check_finite(folder)
    load_model(folders[0])  # has every weight that its config asks for; the others must have the same
    for other in folders[1:]:
        _check_alike(folders[0], other)
    target = Path(settings.output_dir)
    with whole_folder(target) as part:
        _copy_settings(folders[0], part)
        tensors = write_average(folders, weights, part)
        found = find_not_finite(part)
        if found is not None:
            raise StageFailed(f"{STAGE}: {found[1]} has values beyond those of its dtype in {folders[0]}")
        lineage.append(part, folders, STAGE, mapping, None)
    for folder, weight in zip(folders, weights, strict=True):
        print(f"{weight:8.4f} × {folder}")
    print(f"{tensors} tensors written to {target}")
    keys = {"models": {STAGE: str(target)}, "output_dir": free_folder(target, f"{target.name}-scores")}
    return stage_command("evaluate", config, keys)


def _weights(settings: MergeSettings, file: str) -> list[float]:
    parents = settings.models
    if len(parents) < 2:
        raise mistake(file, "models", [parent.model for parent in parents], "expected at least two models")
    given = [parent.weight for parent in parents]
    if settings.method == "soup":
        if any(weight is not None for weight in given):
            raise mistake(file, "models.weight", given, "a soup is a plain average; expected none (or method: linear)")
        return [1 / len(parents)] * len(parents)
    weights = [weight for weight in given if weight is not None]
    if len(weights) < len(parents) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise mistake(file, "models.weight", given, "expected one for each model, adding up to 1")
    if not all(0 <= weight <= 1 for weight in weights):
        raise mistake(file, "models.weight", given, "expected shares from 0 to 1")
    return weights


def _check_lineage(folder: Path) -> None:
    """Raise Mistake where the weights are not those that the folder's lineage ends with."""
    if lineage.read(folder) and not lineage.matches_weights(folder):
        expected = f"its weights are not those that {lineage.FILE} names, so the merge's lineage would be wrong"
        raise mistake(folder, None, NO_VALUE, expected)


def _check_alike(first: Path, other: Path) -> None:
    """Raise Mistake unless both models turn a conversation into the same tokens."""
    for name in ("chat_template.jinja", "tokenizer.json"):
        ours, theirs = _content(first / name), _content(other / name)
        if ours != theirs:
            what = "is missing in one of them" if None in (ours, theirs) else "differs"
            raise mistake(other, name, NO_VALUE, f"{what}, compared with {first}; only models of one tokenizer merge")
    special = ("eos_token", "pad_token", "bos_token", "chat_template")
    ours, theirs = _content(first / "tokenizer_config.json") or {}, _content(other / "tokenizer_config.json") or {}
    for key in special:
        if ours.get(key) != theirs.get(key):
            raise mistake(other, f"tokenizer_config.json: {key}", theirs.get(key), f"expected that of {first}")


def _content(file: Path) -> Any:
    """A file's text, or the object that a JSON file holds; None where there is none."""
    with reading(file):
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else text


def _copy_settings(source: Path, target: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}):
        with reading(file):
            content = file.read_bytes()
        (target / file.name).write_bytes(content)
