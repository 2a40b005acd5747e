"""Bugs to plant in a training engine, one function each, to show that the parity tests see them.

They live in a module of their own because the ranks of the pool import them by name.
"""

from dataclasses import replace

from launch.train.engine import TrainingEngine
from model.llama import LossBlock
from model.micro_batch import CurrentMicroBatch
from nanotron_recipes.topology import padded_vocab_size
from parallel.parameters import Shard


def one_seed_for_all_tensor_ranks(engine: TrainingEngine) -> None:
    """Every tensor-parallel rank draws its own shard, from the same seed: all shards start equal."""
    for bucket in engine.built.buckets:
        for index, slot in enumerate(bucket.slots):
            everything = (slice(None),) * len(slot.local_shape)
            bucket.slots[index] = replace(slot, shard=Shard(slot.local_shape, ((everything, everything),)))


def without_sum_over_holders(engine: TrainingEngine, suffix: str) -> None:
    """The partial gradients of the parameters with this ending are not summed over the ranks that hold a copy."""
    for bucket in engine.built.buckets:
        for index, slot in enumerate(bucket.slots):
            if slot.name.endswith(suffix):
                bucket.slots[index] = replace(slot, partial_gradient=False)
    engine.gradients._tied_ranges = engine.gradients._find_tied_ranges()


def swapped_chunks(engine: TrainingEngine, suffix: str) -> None:
    """Tensor-parallel rank 1 takes the last two chunks (k and v, or gate and up) of its shard for each other."""
    if engine.context.tp_rank != 1:
        return
    for bucket in engine.built.buckets:
        for index, slot in enumerate(bucket.slots):
            if slot.name.endswith(suffix):
                *others, (local_a, global_a), (local_b, global_b) = slot.shard.pairs
                pairs = (*others, (local_a, global_b), (local_b, global_a))
                bucket.slots[index] = replace(slot, shard=replace(slot.shard, pairs=pairs))


class _MeanOfMeans(CurrentMicroBatch):
    """A loss scale that divides by the valid targets of the micro-batch instead of those of the global batch."""

    replicas = 1

    @property  # type: ignore[override]
    def loss_scale(self) -> float:
        return 1.0 / (float(self.value.target_mask.sum()) * self.replicas)

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        """What the engine asks for is ignored: that is the bug."""


def mean_of_micro_batch_means(engine: TrainingEngine) -> None:
    """Every micro-batch counts the same, however many valid targets it has."""
    current = engine.built.current
    current.__class__ = _MeanOfMeans
    current.replicas = engine.topology.dp  # type: ignore[attr-defined]


def without_the_sum_of_the_first_bucket(engine: TrainingEngine) -> None:
    """One bucket of gradients is not summed over the data-parallel replicas."""
    launch, first = engine.gradients._launch, engine.built.buckets[0]
    engine.gradients._launch = lambda bucket: None if bucket is first else launch(bucket)  # type: ignore[method-assign]


def padding_in_the_softmax(engine: TrainingEngine) -> None:
    """Rows of the vocabulary that are no tokens take part in the softmax."""
    for module in engine.built.module.modules():
        if isinstance(module, LossBlock):
            module.vocab_size = padded_vocab_size(engine.recipe)
