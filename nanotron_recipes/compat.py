"""nanotron 0.4's older spellings, read into the later ones."""

from __future__ import annotations

from typing import Any

_OPTIMIZER_KEYS = ("adam_beta1", "adam_beta2", "adam_eps", "torch_adam_is_fused")


def modernise(mapping: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the mapping with `data` as a data stage and the constants of Adam under `optimizer_factory`, and a note
    for each. What stands in both spellings is left as it is, so that validation names it."""
    result, notes = dict(mapping), []
    if "data" in result and "data_stages" not in result:
        data = result.pop("data")
        if data is not None:
            result["data_stages"] = [{"name": "stable", "start_training_step": 1, "data": data}]
        notes.append("data: an older spelling; read as the only entry of data_stages")
    optimizer = result.get("optimizer")
    if isinstance(optimizer, dict):
        factory = optimizer.get("optimizer_factory") or {}
        old = [key for key in _OPTIMIZER_KEYS if key in optimizer and isinstance(factory, dict) and key not in factory]
        if old:
            moved = {key: optimizer[key] for key in old}
            rest = {key: value for key, value in optimizer.items() if key not in moved}
            result["optimizer"] = {**rest, "optimizer_factory": {**factory, **moved}}
            notes.append(f"optimizer.{{{','.join(old)}}}: older spellings; read as optimizer.optimizer_factory")
    return result, notes
