"""What the blocks of a pipeline stage read of the micro-batch that is in its forward pass.

nanotron's PipelineBlock accepts tensors that travel between stages and nothing else. Ids, targets, positions and masks
are known on every rank from the data plan, so they are not sent: the model sets them here before it calls its blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from model.attention import AttentionBackend, AttentionInputs, attention_inputs
from model.rope import RopeTable, rope_table


@dataclass
class MicroBatch:
    """One micro-batch of B sequences of S tokens on this rank's device.

    Attributes:
        input_ids: int64 [B * S].
        target_ids: int64 [B * S].
        target_mask: bool [B * S]; False where a target does not count (it starts a document).
        position_ids: int64 [B, S], restarting at every document.
        rope: rotation of each position.
        attention: who may look at whom.
    """

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    target_mask: torch.Tensor
    position_ids: torch.Tensor
    rope: RopeTable
    attention: AttentionInputs


@dataclass
class CurrentMicroBatch:
    """Shared by all blocks of a rank.

    Attributes:
        loss_scale: what the summed negative log-likelihood is multiplied with for the backward pass.
    """

    loss_scale: float = 1.0
    _micro_batch: MicroBatch | None = field(default=None, repr=False)

    def set(self, micro_batch: MicroBatch) -> None:
        self._micro_batch = micro_batch

    @property
    def value(self) -> MicroBatch:
        assert self._micro_batch is not None, "the model's forward sets the micro-batch before it calls a block"
        return self._micro_batch


def prepare_micro_batch(
    arrays: Mapping[str, torch.Tensor],
    *,
    head_dim: int,
    rope_theta: float,
    mask_documents: bool,
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
) -> MicroBatch:
    """Bring a micro-batch to the device and derive what the layers share.

    Args:
        arrays: input_ids, target_ids, position_ids (int64 [B, S]) and target_mask (bool [B, S]) on the CPU.
        mask_documents: whether attention stops at document boundaries (where position_ids restart).
    """
    tensors = {key: value.to(device, non_blocking=True) for key, value in arrays.items()}
    positions = tensors["position_ids"]
    return MicroBatch(
        input_ids=tensors["input_ids"].flatten(),
        target_ids=tensors["target_ids"].flatten(),
        target_mask=tensors["target_mask"].flatten(),
        position_ids=positions,
        rope=rope_table(positions, head_dim, rope_theta, dtype),
        attention=attention_inputs(arrays["position_ids"], backend, dtype, mask_documents, device),
    )
