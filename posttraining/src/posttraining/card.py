"""The model card of a pipeline's result: lineage, data, scores."""

import json
from collections.abc import Mapping
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
            f'chat = pipeline("text-generation", "{folder}")',
            'print(chat([{"role": "user", "content": "…"}], max_new_tokens=256)[0]["generated_text"][-1]["content"])',
            "```",
            "",
            "## Training",
            "",
            f"Each stage started from the weights of the one before it. `{lineage.FILE}` holds every setting, the "
            "versions and the hashes.",
            "",
            "| stage | settings | data fingerprint | weights sha256 |",
            "|---|---|---|---|",
            *(_line(stage) for stage in stages),
            "",
            "## Scores",
            "",
            scores,
            "",
        ]
    )


def _tags(stages: list[dict[str, Any]]) -> list[str]:
    return sorted({"trl", *(str(stage["stage"]) for stage in stages)})


def _line(stage: Mapping[str, Any]) -> str:
    config = stage.get("config") or {}
    settings = ", ".join(f"{key} {config[key]}" for key in _SHOWN if key in config)
    note = f" (let pass the guard: {stage['forced']})" if stage.get("forced") else ""
    data = str(stage.get("data_fingerprint") or "–")[:16]
    return f"| {stage['stage']}{note} | {settings or '–'} | `{data}` | `{stage['weights_sha256'][:16]}` |"
