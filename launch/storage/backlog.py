"""Which of a node's checkpoints wait for their upload, and which of those is given up."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launch.storage.state import Checkpoint, GivenUp


@dataclass
class Backlog:
    """What a node has to upload; all checkpoints are (step, identity).

    Attributes:
        limit: `s3_upload.max_backlog`.
        here: on this node's disk.
        done: whole in the store.
        given_up: with the reason.
    """

    limit: int
    here: Collection[Checkpoint] = ()
    done: Collection[Checkpoint] = ()
    given_up: Mapping[Checkpoint, GivenUp] | None = None

    def waiting(self) -> list[Checkpoint]:
        """Ascending by step."""
        finished = {*self.done, *(self.given_up or {})}
        return sorted(one for one in self.here if one not in finished)

    def excess(self, sending: Checkpoint | None) -> list[GivenUp]:
        """What is to be given up: the oldest beyond the limit, never the newest and not what is being sent."""
        waiting = [one for one in self.waiting() if one != sending]
        most = max(0, len(waiting) - self.limit)
        newest = max(self.here, default=None)
        return [
            GivenUp(step, identity, f"{len(waiting)} steps waited, and s3_upload.max_backlog is {self.limit}")
            for step, identity in waiting[:most]
            if (step, identity) != newest
        ]
