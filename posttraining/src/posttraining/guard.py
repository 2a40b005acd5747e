"""What a preference or reinforcement stage may start from: weights that had SFT, and can show it."""

from __future__ import annotations

from pathlib import Path

from posttraining import lineage
from posttraining.errors import NO_VALUE, mistake

SFT = "sft"


def require_sft(folder: Path, stage: str, force_reason: str | None) -> str | None:
    """Refuse (Mistake) to start `stage` from a folder whose lineage is missing, does not fit its weights or has no SFT.

    With `force_reason` the stage may start all the same; the reason is returned for the lineage when it was needed,
    None when it was not.
    """
    objection = _objection(folder, stage)
    if objection is None:
        return None
    if force_reason is not None and force_reason.strip():
        return force_reason.strip()
    raise mistake(folder, None, NO_VALUE, f'{objection} (--force "why" starts it all the same, and is recorded)')


def _objection(folder: Path, stage: str) -> str | None:
    stages = lineage.read(folder)
    if not stages:
        return f"has no {lineage.FILE}; {stage} starts from a model that had the stage {SFT}"
    if not lineage.matches_weights(folder):
        return (
            f"its weights are not those that {lineage.FILE} names; {stage} starts from the weights of the stage {SFT}"
        )
    names = [entry["stage"] for entry in stages]
    if SFT not in names:
        return f"the stage {SFT} is missing (it had {', '.join(names)}); run `posttraining {SFT}` before {stage}"
    return None
