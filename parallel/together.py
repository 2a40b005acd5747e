"""Doing something on all ranks so that none waits for one that has given up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as torch_dist

T = TypeVar("T")
Group = torch_dist.ProcessGroup | None
"""None is the world, or this process alone where there is no world."""

_FILES_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for files that another one sends to others first."""


class FailedTogether(RuntimeError):
    """One rank could not do its part; raised on every rank with that rank's reason."""


def together(call: Callable[[], T], group: Group = None) -> list[T]:
    """Run `call` here, as every rank of `group` does; the results of all of them, in the order of their ranks.

    Raises:
        FailedTogether: on all ranks, where `call` raised on one.
    """
    outcome: tuple[T | None, str] = (None, "")
    try:
        outcome = (call(), "")
    except Exception as error:
        outcome = (None, reason_of(error))
    outcomes = gather(outcome, group)
    for _, reason in outcomes:
        if reason:
            raise FailedTogether(reason)
    return [value for value, _ in outcomes]  # type: ignore[misc]  # each has a value: none has a reason


def gather(value: T, group: Group = None) -> list[T]:
    """What every rank of `group` has, in the order of their ranks."""
    if not torch_dist.is_initialized():
        return [value]
    values = [value] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def files_group() -> Iterator[Group]:
    """A group of all ranks for sending files: over gloo, as these lie in host memory, and with hours of patience.

    Every rank calls this. None without a world.
    """
    if not torch_dist.is_initialized():
        yield None
        return
    group = torch_dist.new_group(backend="gloo", timeout=_FILES_TIMEOUT)
    try:
        yield group
    finally:
        torch_dist.destroy_process_group(group)


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's rank in `group` and the number of its ranks; (0, 1) without a world."""
    if not torch_dist.is_initialized():
        return 0, 1
    return torch_dist.get_rank(group), torch_dist.get_world_size(group)


def reason_of(error: BaseException) -> str:
    """An exception in a few words, without its type where the system said what was wrong."""
    if isinstance(error, FailedTogether):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror[0].lower() + error.strerror[1:]
    if "inline_container" in str(error):
        # torch's archive writer drops the system's reason.
        return "no space left on device, or another failure to write (torch does not say which)"
    return f"{type(error).__name__}: {error}"
