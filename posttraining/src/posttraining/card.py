"""The model card of a pipeline's result: lineage, data, scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttraining import lineage
from posttraining.files import write_whole

_SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "loss_type", "beta", "method", "seed")
"""Keys of a stage's config that a reader looks for first; all of them are in the lineage."""


def write_card(folder: Path, scores: str) -> None:
    """Write README.md into a model's folder. `scores`: the report's tables."""
    write_whole(folder / "README.md", card(folder, scores))


def card(folder: Path, scores: str) -> str:
    """The text of the card."""
    stages = lineage.read(folder) or []
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _tags(stages)}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# {folder.name}",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'chat = pipeline("text-generation", ".")  # in the folder of this card; elsewhere its path',
            'print(chat([{"role": "user", "content": "…"}], max_new_tokens=256)[0]["generated_text"][-1]["content"])',
            "```",
            "",
            "## Training",
            "",
            f"`{lineage.FILE}` holds every setting, the versions and the hashes.",
            "",
            "| stage | started from | settings | data | data fingerprint | weights sha256 |",
            "|---|---|---|---|---|---|",
            *(_line(stage, _started_from(stage, stages)) for stage in stages),
            "",
            "## Scores",
            "",
            scores,
            "",
        ]
    )


def _tags(stages: list[dict[str, Any]]) -> list[str]:
    return sorted({"trl", *(str(stage["stage"]) for stage in stages)})


def _started_from(stage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages whose weights this one began with, by name; of a merge with their shares."""
    names = {entry["weights_sha256"]: str(entry["stage"]) for entry in stages}
    parents = stage.get("parent") or []
    if isinstance(parents, str):
        return _name(parents, names)
    models = (stage.get("config") or {}).get("models") or []
    weights = [model.get("weight") for model in models]
    if len(weights) != len(parents) or None in weights:
        weights = [1 / len(parents) for _ in parents]
    shares = [f"{weight:.4g} {_name(parent, names)}" for weight, parent in zip(weights, parents, strict=True)]
    return " + ".join(shares) or "–"


def _name(weights_sha256: str, names: Mapping[str, str]) -> str:
    return names.get(weights_sha256, f"`{weights_sha256[:16]}`")


def _line(stage: Mapping[str, Any], started_from: str) -> str:
    config = stage.get("config") or {}
    settings = ", ".join(f"{key} {config[key]}" for key in _SHOWN if key in config)
    note = f" (let pass the guard: {stage['forced']})" if stage.get("forced") else ""
    fingerprint = str(stage.get("data_fingerprint") or "–")[:16]
    cells = [f"{stage['stage']}{note}", started_from, settings or "–", _data(config.get("data"))]
    return f"| {' | '.join(cells)} | `{fingerprint}` | `{stage['weights_sha256'][:16]}` |"


def _data(data: Any) -> str:
    """What the config says of the data, in a few words."""
    if not isinstance(data, Mapping):
        return "–"
    if data.get("generated"):
        return f"{data.get('examples')} generated problems, {data['generated']}"
    return ", ".join(_source(source) for source in data.get("sources") or [data])


def _source(source: Mapping[str, Any]) -> str:
    path = Path(str(source.get("path")))
    # Of a file on this machine only what says which one it is.
    names = ["/".join(path.parts[-2:]) if path.is_absolute() else str(path)]
    return " ".join([*names, *(str(source[key]) for key in ("name", "split") if source.get(key))])
