"""The layout of the flat buffers."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parallel.buckets import ALIGNMENT, Bucket, Range, allocate, merge_ranges, plan_buckets
from parallel.nanotron_import import import_nanotron

import_nanotron()

from nanotron.parallel.parameters import NanotronParameter  # noqa: E402


@dataclass
class DataParallelGrid:
    """As much of an `EngineContext` as a layout needs: a rank among `dp` replicas."""

    dp: int
    dp_rank: int

    @property
    def rank(self) -> int:
        return self.dp_rank

    @property
    def dp_pg(self) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: self.dp)

    def get_3d_ranks(self, rank: int) -> tuple[int, int, int]:
        return 0, rank, 0


SIZES = st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=12)


def plan(sizes: list[tuple[int, bool]], dp: int, dp_rank: int, bucket_numel: int, shard: bool) -> list[Bucket]:
    model = nn.ParameterDict({f"p{i}": NanotronParameter(torch.zeros(n)) for i, (n, _) in enumerate(sizes)})
    decayed = {f"p{i}": is_decayed for i, (_, is_decayed) in enumerate(sizes)}
    return plan_buckets(
        model,
        DataParallelGrid(dp, dp_rank),  # type: ignore[arg-type]
        is_decayed=decayed.__getitem__,
        bucket_bytes=bucket_numel * 4,
        shard_over_dp=shard,
    )


@given(SIZES, st.integers(1, 4), st.integers(1, 600), st.booleans())
def test_slots_are_aligned_apart_and_complete(
    sizes: list[tuple[int, bool]], dp: int, bucket_numel: int, shard: bool
) -> None:
    buckets = plan(sizes, dp, 0, bucket_numel, shard)
    slots = [slot for bucket in buckets for slot in bucket.slots]
    assert sorted((slot.name, slot.numel, slot.decayed) for slot in slots) == sorted(
        (f"p{i}", n, is_decayed) for i, (n, is_decayed) in enumerate(sizes)
    )
    for bucket in buckets:
        assert all(slot.offset % ALIGNMENT == 0 for slot in bucket.slots)
        ends = [0, *(slot.range[1] for slot in bucket.slots)]
        assert all(slot.offset >= end for slot, end in zip(bucket.slots, ends, strict=False)), "no overlap, in order"
        assert bucket.numel >= ends[-1] and bucket.numel % dp == 0


@given(SIZES, st.integers(1, 4), st.integers(1, 600))
def test_the_owned_ranges_of_the_replicas_are_a_partition(
    sizes: list[tuple[int, bool]], dp: int, bucket_numel: int
) -> None:
    per_rank = [plan(sizes, dp, rank, bucket_numel, True) for rank in range(dp)]
    for same_bucket in zip(*per_rank, strict=True):
        assert len({tuple(bucket.slots[0].range) for bucket in same_bucket}) == 1
        bounds = [bucket.owned for bucket in same_bucket]
        assert bounds[0][0] == 0 and bounds[-1][1] == same_bucket[0].numel
        assert all(left[1] == right[0] for left, right in pairwise(bounds))
        assert len({end - start for start, end in bounds}) == 1


@given(SIZES, st.integers(1, 4), st.integers(1, 600))
def test_ranges_cover_the_wanted_elements_of_the_owned_part_and_no_others(
    sizes: list[tuple[int, bool]], dp: int, bucket_numel: int
) -> None:
    for rank in range(dp):
        for bucket in plan(sizes, dp, rank, bucket_numel, True):
            kind = torch.zeros(bucket.numel)
            for slot in bucket.slots:
                kind[slot.range[0] : slot.range[1]] = 1 if slot.decayed else 2
            owned = kind[bucket.owned[0] : bucket.owned[1]]
            covered = torch.zeros_like(owned)
            for start, end in bucket.ranges(lambda slot: slot.decayed):
                covered[start:end] += 1
            assert covered.max() <= 1
            assert bool((covered[owned == 1] == 1).all()) and bool((covered[owned == 2] == 0).all())


def test_without_zero_every_replica_owns_everything() -> None:
    assert [bucket.owned for bucket in plan([(100, True)], 3, 2, 1000, False)] == [(0, 192)]


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([(0, 32), (32, 64)], [(0, 64)]),
        ([(0, 5), (32, 40)], [(0, 40)]),
        ([(0, 32), (64, 70)], [(0, 32), (64, 70)]),
        ([], []),
    ],
)
def test_merging_bridges_alignment_gaps_only(ranges: list[Range], merged: list[Range]) -> None:
    assert merge_ranges(ranges) == merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_views_and_only_half_precision_has_a_master_copy(dtype: torch.dtype) -> None:
    buckets = plan([(10, True), (40, False)], 2, 1, 1000, True)
    views = allocate(buckets, dtype, torch.device("cpu"), for_training=True)
    views["p0"].fill_(1.0)
    [bucket] = buckets
    assert bucket.parameters.sum() == 10 and bucket.parameters.dtype == dtype
    assert bucket.gradients.dtype == bucket.master.dtype == torch.float32
    assert (bucket.master.data_ptr() == bucket.owned_parameters.data_ptr()) == (dtype == torch.float32)


def test_a_model_that_is_not_trained_has_no_gradients() -> None:
    buckets = plan([(10, True)], 1, 0, 1000, False)
    allocate(buckets, torch.bfloat16, torch.device("cpu"), for_training=False)
    assert buckets[0].gradients.numel() == buckets[0].master.numel() == 0
