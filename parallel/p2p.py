"""Point-to-point messages between pipeline stages."""

import time
from collections import deque
from typing import Any

import torch

from parallel.nanotron_import import import_nanotron
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron import distributed as nanotron_dist  # noqa: E402
from nanotron.parallel.pipeline_parallel.p2p import P2P, P2PTensorMetaData  # noqa: E402


class BufferedP2P(P2P):
    """nanotron's `P2P` whose sends return at once.

    gloo's send is a rendezvous: with 1F1B two neighbours that both send first wait for each other for ever. Here a
    send posts a copy and keeps it until `flush`, which the training loop calls once a step, when every receiver has
    taken its message.

    Attributes:
        waited_seconds: in `recv_tensors` so far, for messages that were not there yet.
    """

    def __init__(self, pg: Any, device: torch.device) -> None:
        super().__init__(pg, device)
        self.waited_seconds = 0.0
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()

    def _post(self, tensor: torch.Tensor, to_rank: int, tag: int) -> None:
        destination = nanotron_dist.get_global_rank(group=self.pg, group_rank=to_rank)
        work = nanotron_dist.isend(tensor, dst=destination, group=self.pg, tag=tag)
        self._in_flight.append((work, tensor))

    def send_tensors(self, tensors: list[torch.Tensor], to_rank: int, tag: int = 0) -> None:
        """Post every tensor with its metadata to pipeline rank `to_rank`; returns before they arrive."""
        for tensor in tensors:
            # What is received is contiguous: the receiver needs the values, not the sender's strides.
            payload = tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_(tensor.requires_grad)
            self._post(P2PTensorMetaData.to_first_metadata(payload, device=self.device), to_rank, tag)
            self._post(P2PTensorMetaData.to_second_metadata(payload, device=self.device), to_rank, tag)
            self._post(payload.detach(), to_rank, tag)

    def recv_tensors(self, num_tensors: int, from_rank: int, tag: int = 0) -> list[torch.Tensor]:
        """Receive so many tensors from pipeline rank `from_rank`, waiting for them."""
        began = time.perf_counter()
        try:
            received: list[torch.Tensor] = super().recv_tensors(num_tensors, from_rank, tag)
            return received
        finally:
            self.waited_seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Wait until every posted message has been taken and drop the copies."""
        while self._in_flight:
            work, _ = self._in_flight.popleft()
            work.wait()


def build_p2p(context: EngineContext) -> P2P:
    """The channel between pipeline stages: buffered on gloo, nanotron's own on nccl (whose sends do not block)."""
    channel = BufferedP2P if context.device.type == "cpu" else P2P
    return channel(context.pp_pg, device=context.device)


def flush_sends(p2p: P2P) -> None:
    """End of a step: release the copies that a `BufferedP2P` keeps; nothing to do on nccl."""
    if isinstance(p2p, BufferedP2P):
        p2p.flush()
