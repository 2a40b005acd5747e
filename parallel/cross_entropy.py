"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as torch_dist


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: Any, z_loss_coefficient: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = group.size()
        shard = logits.shape[-1]
        first = torch_dist.get_rank(group) * shard

        maximum = logits.amax(dim=-1)
        if parts > 1:
            torch_dist.all_reduce(maximum, op=torch_dist.ReduceOp.MAX, group=group)
        exponentials = logits - maximum.unsqueeze(-1)

        elsewhere = (targets < first) | (targets >= first + shard)
        local_targets = (targets - first).masked_fill(elsewhere, 0)
        target_logits = exponentials.gather(-1, local_targets.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials.exp_()
        sums = exponentials.sum(dim=-1)
        if parts > 1:
            both = torch.stack((target_logits, sums))
            torch_dist.all_reduce(both, group=group)
            target_logits, sums = both.unbind()

        log_sums = sums.log()
        nll = log_sums - target_logits
        log_normalizer = log_sums + maximum
        ctx.save_for_backward(exponentials, sums, local_targets, elsewhere, log_normalizer)
        ctx.z_loss_coefficient = z_loss_coefficient
        z_loss = z_loss_coefficient * log_normalizer.square()
        return nll, z_loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad_nll, grad_z = grads
        exponentials, sums, local_targets, elsewhere, log_normalizer = ctx.saved_tensors
        scale = grad_nll + grad_z * (2 * ctx.z_loss_coefficient) * log_normalizer
        # exponentials / sums is the softmax; dividing the scale saves a pass over the logits.
        grad = exponentials.mul_((scale / sums).unsqueeze(-1))
        at_target = -grad_nll.masked_fill(elsewhere, 0.0)
        grad.scatter_add_(-1, local_targets.unsqueeze(-1), at_target.unsqueeze(-1))
        return grad, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: Any, z_loss_coefficient: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each target, and its z-loss.

    nanotron's `sharded_cross_entropy` needs three collectives and does not return the log-normaliser that the z-loss
    (PaLM, arXiv:2204.02311, section 5: coefficient * log(Z)^2) needs; here it is one for the maximum and one for the
    rest, and none on a single rank.

    Args:
        logits: float32 [..., vocabulary / group size]; columns that are padding hold -inf.
        targets: int64 [...], ids of the whole vocabulary, the same on every rank.
        group: the tensor-parallel group, in vocabulary order.
        z_loss_coefficient: 0 leaves the z-loss out.

    Returns:
        (nll, z_loss): two float32 tensors [...], in nats, the same on every rank.
    """
    nll, z_loss = _VocabParallelCrossEntropy.apply(logits, targets, group, z_loss_coefficient)
    return nll, z_loss
