"""A pool of processes that play the ranks of many small worlds, one after the other.

Importing torch costs seconds a process. The pool's processes are forked from one server that has imported it, so that
a whole matrix of topologies runs at the price of one start.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from nanotron_recipes.machine import CONNECTIONS, CONNECTIONS_VARIABLE


class RankFailure(RuntimeError):
    """A rank of the pool raised; the message holds the rank's traceback."""


class RankPool:
    """Runs functions as all ranks of a gloo world of any size up to `max_world_size`.

    Usage::

        with RankPool(8) as pool:
            results = pool.run(4, function, *arguments)   # function(*arguments) on 4 ranks -> 4 results

    `function` must be importable (defined at module level). The torchrun environment is set, the process group is not
    initialised: that is the function's own business, as in a real run.
    """

    def __init__(self, max_world_size: int, timeout: timedelta = timedelta(minutes=5)) -> None:
        self._timeout = timeout.total_seconds()
        self._max_world_size = max_world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self.num_worlds_run = 0

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call the function on `world_size` ranks and return their results in rank order.

        Raises:
            RankFailure: a rank raised, died, or did not answer in time. The pool is then restarted.
        """
        assert 1 <= world_size <= self._max_world_size
        self._start()
        port = free_port()
        for rank in range(world_size):
            self._pipes[rank].send((world_size, port, function, arguments))
        self.num_worlds_run += 1
        return self._collect(world_size)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parallel.rank_pool_imports"])
        for rank in range(self._max_world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        pending: dict[Any, int] = {self._pipes[rank]: rank for rank in range(world_size)}
        while pending:
            ready = wait(list(pending), timeout=self._timeout)
            if not ready:
                self.close()
                raise RankFailure(
                    f"ranks {sorted(pending.values())} of {world_size} gave no answer in {self._timeout} s"
                )
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, value = self._pipes[rank].recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RankFailure(f"rank {rank} of {world_size}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank of a single-node world on loopback."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            world_size, port, function, arguments = pipe.recv()
        except EOFError:
            return
        # nanotron's asynchronous tensor-parallel layers insist on the second; ranks of real runs have it too.
        os.environ.update({**torchrun_environment(rank, world_size, port), CONNECTIONS_VARIABLE: CONNECTIONS})
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # torch's CheckpointException is no Exception
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
