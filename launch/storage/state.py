"""What the uploader of a node says of itself in the run's folder: `uploads/<node>.json`.

The store alone says what is uploaded; this is what training, `status` and a person read without asking it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanotron_recipes.files import write_atomic

UPLOADS = "uploads"

Checkpoint = tuple[int, str]
"""Step and identity."""


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is whole in the store, every file read back.

    Attributes:
        identity: `launch.storage.remote.identity_of` its manifest.
        seconds: from the first file that this node sent to the end; 0 where it was there already.
        num_bytes: of what this node sent.
        time: when that was known, seconds since the epoch.
        was_there: another process has sent it, and this one found it whole.
    """

    step: int
    identity: str
    seconds: float
    num_bytes: int
    time: float
    was_there: bool = False


@dataclass(frozen=True)
class GivenUp:
    """A checkpoint that is not uploaded, and may be deleted where the policy says so."""

    step: int
    identity: str
    reason: str


@dataclass(frozen=True)
class NodeState:
    """How far the uploader of a node is.

    Attributes:
        launch_id: of the launch that it belongs to.
        place: where the run's objects are: endpoint and URL.
        time: when this was written, seconds since the epoch.
        uploaded: those on this node's disk, and the newest ones, ascending.
        waiting: steps that are not whole in the store, the one that is being sent included.
        sending: the step that is being sent; None: none is.
        sent_bytes: of it, of `sending_bytes`.
        bytes_per_second: of the step that is being sent, so far.
        problem: why nothing is sent, or not everything: what the store, a disk or the run's folder answers; else empty.
    """

    node: str
    launch_id: str
    place: str
    time: float
    uploaded: tuple[Uploaded, ...] = ()
    given_up: tuple[GivenUp, ...] = ()
    waiting: tuple[int, ...] = ()
    sending: int | None = None
    sent_bytes: int = 0
    sending_bytes: int = 0
    bytes_per_second: float = 0.0
    problem: str = ""

    @property
    def done(self) -> list[Checkpoint]:
        """What nothing has to wait for any more."""
        found: list[Uploaded | GivenUp] = [*self.uploaded, *self.given_up]
        return [(one.step, one.identity) for one in found]


@dataclass(frozen=True)
class JointState:
    """All nodes of the newest launch together.

    Attributes:
        uploaded: whole in the store, as far as the nodes remember.
        waiting: steps that some node waits with, ascending.
        given_up: neither uploaded nor to be, each with the reason. A step that is trained again, after a rewind, is
            another checkpoint.
        problems: node -> what the store answers it.
    """

    uploaded: frozenset[Checkpoint]
    waiting: tuple[int, ...]
    given_up: dict[Checkpoint, str]
    problems: dict[str, str]
    nodes: tuple[NodeState, ...] = field(repr=False)

    @property
    def newest(self) -> int | None:
        """The newest step in the store."""
        return max((step for step, _ in self.uploaded), default=None)


def state_file(run: Path, node: str) -> Path:
    """Where the uploader of a node writes."""
    return run / UPLOADS / f"{node}.json"


def log_file(run: Path, node: str) -> Path:
    """What it prints."""
    return run / UPLOADS / f"{node}.log"


def write_state(run: Path, state: NodeState) -> None:
    """Raises OSError."""
    write_atomic(state_file(run, state.node), json.dumps(asdict(state), indent=1) + "\n")


def read_state(run: Path, node: str) -> NodeState | None:
    """None where there is none, or none that can be read."""
    return _read(state_file(run, node))


def note_pushed(run: Path, made: Uploaded) -> None:
    """Nobody has given up any more what a person has brought to the store. Raises OSError."""
    for file in sorted((run / UPLOADS).glob("*.json")):
        state = _read(file)
        if state is None or not any((one.step, one.identity) == (made.step, made.identity) for one in state.given_up):
            continue
        left = tuple(one for one in state.given_up if (one.step, one.identity) != (made.step, made.identity))
        uploaded = tuple(sorted((*state.uploaded, made), key=lambda one: one.step))
        write_state(run, replace(state, given_up=left, uploaded=uploaded))


def joint_state(run: Path) -> JointState | None:
    """Of a run's folder; None where nothing was ever uploaded."""
    states = [state for file in sorted((run / UPLOADS).glob("*.json")) if (state := _read(file)) is not None]
    if not states:
        return None
    newest = max(states, key=lambda state: state.time).launch_id
    current = [state for state in states if state.launch_id == newest]
    alike = [state for state in states if state.place == current[0].place]
    uploaded = frozenset((one.step, one.identity) for state in alike for one in state.uploaded)
    return JointState(
        uploaded,
        tuple(sorted({step for state in current for step in state.waiting})),
        {key: one.reason for key, one in given_up_of(alike).items() if key not in uploaded},
        {state.node: state.problem for state in current if state.problem},
        tuple(current),
    )


def _read(file: Path) -> NodeState | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        uploaded = tuple(Uploaded(**one) for one in content.pop("uploaded"))
        given_up = tuple(GivenUp(**one) for one in content.pop("given_up"))
        return NodeState(**{**content, "waiting": tuple(content["waiting"])}, uploaded=uploaded, given_up=given_up)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def given_up_of(states: Sequence[NodeState]) -> dict[Checkpoint, GivenUp]:
    """By step and identity."""
    return {(one.step, one.identity): one for state in states for one in state.given_up}
