"""Which of a node's checkpoints wait for their upload, and which of those are given up.

The launch decides, when a save has ended, and not the uploader: so a disk never holds more than `keep_last` steps, the
one that is being written, and `max_backlog`, however late the uploader is.
"""

from collections.abc import Collection

from launch.storage.state import Checkpoint, GivenUp


def waiting_of(here: Collection[Checkpoint], done: Collection[Checkpoint]) -> list[Checkpoint]:
    """What is on a disk and neither in the store nor given up, ascending by step."""
    return sorted(set(here).difference(done))


def beyond_backlog(
    here: Collection[Checkpoint], done: Collection[Checkpoint], sending: int | None, limit: int
) -> list[GivenUp]:
    """What is to be given up: of what waits beside the newest, the oldest beyond the limit.

    Args:
        here: on this node's disk.
        done: in the store, or given up already.
        sending: the step that is being sent: it counts, and is never given up.
        limit: `s3_upload.max_backlog`.
    """
    newest = max(here, default=None)
    older = [one for one in waiting_of(here, done) if one != newest]
    too_many = max(0, len(older) - limit)
    reason = f"{len(older)} steps waited beside the newest, and s3_upload.max_backlog is {limit}"
    return [GivenUp(*one, reason) for one in older if one[0] != sending][:too_many]
