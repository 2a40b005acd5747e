"""The data card of a preference set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_FRONT = """---
task_categories: [text-generation]
tags: [preference, dpo, apo]
configs:
  - config_name: default
    data_files:
      - {split: train, path: pairs.jsonl}
      - {split: held_out, path: held_out.jsonl}
---
"""


def render_card(
    *,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    reasons: Counter[str],
    repeated: int,
    prompts: int,
    fingerprints: Mapping[str, str],
    config: Mapping[str, Any],
) -> str:
    """README.md of a pairs folder.

    `rows`: the pairs by file name. `reasons`: why prompts gave none. `repeated`: prompts dropped as repetitions.
    `fingerprints`: sha256 of the rows by file name. `config`: the stage's keys.
    """
    sides = _sides(rows)
    lines = ["# Preference pairs", ""]
    if sides:
        lines += ["A strong model's answer is chosen, a weaker one's rejected, to the same prompt.", ""]
        lines += ["| side | model | weights sha256 | temperature | longest | backend | mean tokens |"]
        lines += ["|---|---|---|---:|---:|---|---:|", *sides, ""]
    lines += ["| file | pairs | sha256 of the rows |", "|---|---:|---|"]
    lines += [f"| {name} | {len(pairs)} | `{fingerprints[name]}` |" for name, pairs in rows.items()]
    lines += ["", f"{prompts} prompts, {repeated} repetitions left out before. Those that gave no pair:", ""]
    lines += ["| reason | prompts |", "|---|---:|", *(f"| {why} | {count} |" for why, count in sorted(reasons.items()))]
    lines += [
        "",
        "Each row has `prompt`, `chosen`, `rejected` as messages, the prompt's `answer` where it has one,",
        "`chat_template_kwargs` where the recipe gives any, and `generation`: model, weights and sampling of both",
        "answers. Made from:",
        "",
        "```yaml",
    ]
    lines += [yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).strip(), "```", ""]
    return _FRONT + "\n".join(lines)


def _sides(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    pairs = [pair for some in rows.values() for pair in some]
    lines = []
    for side in ("chosen", "rejected"):
        if not pairs:
            continue
        how = pairs[0]["generation"][side]
        mean = sum(pair["generation"][side]["tokens"] for pair in pairs) / len(pairs)
        lines.append(
            f"| {side} | {how['model']} | `{how['weights_sha256'][:12]}` | {how['temperature']} | "
            f"{how['max_new_tokens']} | {how['backend']} | {mean:.1f} |"
        )
    return lines
