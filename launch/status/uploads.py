"""How far the uploads of a run are, by what the uploaders of its nodes last wrote; the store is not asked."""

from dataclasses import dataclass
from pathlib import Path

from launch.storage.state import joint_state


@dataclass(frozen=True)
class UploadStatus:
    """Of all nodes together."""

    newest: int | None
    """The newest step that is whole in the store."""
    waiting: list[int]
    """Steps that are not, ascending."""
    given_up: list[int]
    """Steps that will not be, unless somebody pushes them."""
    bytes_per_second: float
    """Of all nodes that send."""
    problems: dict[str, str]
    """Node -> what the store last answered it, where that was no success."""


def upload_status(run: Path) -> UploadStatus | None:
    """Of a run's folder; None where nothing was ever uploaded."""
    joint = joint_state(run)
    if joint is None:
        return None
    speed = sum(state.bytes_per_second for state in joint.nodes)
    trained_again = {*(step for step, _ in joint.uploaded), *joint.waiting}
    given_up = sorted({step for step, _ in joint.given_up} - trained_again)
    return UploadStatus(joint.newest, list(joint.waiting), given_up, speed, joint.problems)


def uploads_text(found: UploadStatus, *, is_training: bool) -> tuple[str, bool]:
    """For people, and whether somebody should look."""
    parts = ["nothing in the store yet" if found.newest is None else f"step {found.newest} in the store"]
    if found.waiting:
        parts.append(f"steps {', '.join(map(str, found.waiting))} wait")
    if is_training and found.bytes_per_second:
        parts.append(f"{found.bytes_per_second / 1e6:,.1f} MB/s")
    if found.given_up:
        parts.append(f"given up: {', '.join(map(str, found.given_up))} (`checkpoints push` sends what is still here)")
    parts += [f"{node}: {problem}" for node, problem in list(found.problems.items())[:2]]
    return " · ".join(parts), bool(found.problems)
