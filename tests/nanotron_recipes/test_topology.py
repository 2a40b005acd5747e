"""dp, pp, tp and the cut of the batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import (
    divisors,
    global_batch_size,
    largest_world_size,
    local_world_size,
    next_multiple,
    padded_vocab_size,
    resolve_topology,
    with_data_parallel,
)

TINY = load_recipe("tiny").recipe


def changed(recipe: Recipe, *, tokens: dict[str, object] | None = None, **parallelism: object) -> Recipe:
    return recipe.model_copy(
        update={
            "tokens": recipe.tokens.model_copy(update=tokens or {}),
            "parallelism": recipe.parallelism.model_copy(update=parallelism),
        }
    )


@settings(deadline=None)
@given(
    batch=st.integers(1, 200), dp=st.integers(1, 8), pp=st.integers(1, 6), tp=st.integers(1, 4), size=st.integers(1, 12)
)
def test_a_resolved_topology_covers_the_batch_exactly(batch: int, dp: int, pp: int, tp: int, size: int) -> None:
    recipe = changed(TINY, tokens={"global_batch_size": batch, "micro_batch_size": size}, pp=pp, tp=tp)
    try:
        topology = resolve_topology(recipe, dp * pp * tp)
    except UserError:
        assert batch % dp or batch // dp % size or batch // dp // size < pp - 1
        return
    assert topology.dp == dp and topology.world_size == dp * pp * tp
    assert topology.dp * topology.micro_batch_size * topology.num_micro_batches == topology.global_batch_size == batch


@settings(deadline=None)
@given(batch=st.integers(1, 200), dp=st.integers(1, 8), pp=st.integers(1, 6))
def test_auto_is_the_largest_micro_batch_that_fills_the_pipeline(batch: int, dp: int, pp: int) -> None:
    recipe = changed(TINY, tokens={"global_batch_size": batch * dp}, pp=pp, pp_engine="afab")
    topology = resolve_topology(recipe, dp * pp)
    if batch < pp:
        assert topology.micro_batch_size == 1
        return
    assert topology.num_micro_batches >= pp
    larger = [size for size in divisors(batch) if size > topology.micro_batch_size]
    assert all(batch // size < pp for size in larger)


@settings(deadline=None)
@given(number=st.integers(1, 10_000))
def test_divisors_are_all_of_them(number: int) -> None:
    assert divisors(number) == [candidate for candidate in range(1, number + 1) if number % candidate == 0]


@settings(deadline=None)
@given(vocabulary=st.integers(1, 200_000), divisor=st.integers(1, 512))
def test_padding_is_the_next_multiple(vocabulary: int, divisor: int) -> None:
    padded = next_multiple(vocabulary, divisor)
    assert padded % divisor == 0 and 0 <= padded - vocabulary < divisor


def test_the_padded_vocabulary_does_not_depend_on_tp() -> None:
    overrides = ["model.model_config.vocab_size=1025", "model.make_vocab_size_divisible_by=64"]
    sizes = {padded_vocab_size(load_recipe("tiny", [*overrides, f"parallelism.tp={tp}"]).recipe) for tp in (1, 2)}
    assert sizes == {1088}


@pytest.mark.parametrize(
    ("overrides", "ranks_per_node", "nodes", "expected"),
    [
        ([], None, 1, 2),
        ([], None, 3, 6),
        ([], 8, 1, 8),
        (["parallelism.pp=2", "parallelism.tp=2"], None, 1, 4),
        (["parallelism.pp=3"], 8, 1, 6),
        (["parallelism.dp=3"], 8, 1, 3),
        (["parallelism.dp=1", "general.cpu_ranks_per_node=4"], None, 2, 1),
    ],
)
def test_the_launcher_starts_whole_replicas(
    overrides: list[str], ranks_per_node: int | None, nodes: int, expected: int
) -> None:
    recipe = load_recipe("tiny", overrides).recipe
    assert local_world_size(recipe, ranks_per_node, nodes) == expected


@settings(deadline=None)
@given(batch=st.integers(1, 60), at_most=st.integers(1, 16), pp=st.integers(1, 3), tp=st.integers(1, 2))
def test_no_larger_world_than_the_largest_one_can_be_trained_on(batch: int, at_most: int, pp: int, tp: int) -> None:
    recipe = changed(TINY, tokens={"global_batch_size": batch}, pp=pp, tp=tp)
    most = local_world_size(recipe, at_most)
    found = largest_world_size(recipe, most)
    assert 0 < found <= most
    resolved = [size for size in range(1, most + 1) if is_resolved(recipe, size)]
    assert found == max(resolved, default=most)


@pytest.mark.parametrize(("gpus", "expected"), [(1, 1), (4, 4), (5, 4), (7, 6), (8, 6), (16, 12)])
def test_the_tiny_recipe_takes_as_many_gpus_as_divide_its_batch(gpus: int, expected: int) -> None:
    assert largest_world_size(TINY, local_world_size(TINY, gpus)) == expected
    fixed = changed(TINY, dp=8)
    assert largest_world_size(fixed, 8) == 8


def is_resolved(recipe: Recipe, world_size: int) -> bool:
    try:
        return resolve_topology(recipe, world_size).world_size == world_size
    except UserError:
        return False


def test_a_world_that_is_not_the_product_is_refused() -> None:
    recipe = load_recipe("tiny", ["parallelism.dp=2", "parallelism.tp=2"]).recipe
    with pytest.raises(UserError, match=r"dp × pp × tp .* = 4 ranks, and 6 were started"):
        resolve_topology(recipe, 6)
    with pytest.raises(UserError, match="expected a divisor of the 3 ranks"):
        resolve_topology(load_recipe("tiny", ["parallelism.tp=2"]).recipe, 3)


def test_a_batch_a_micro_batch_and_an_accumulation_imply_dp() -> None:
    overrides = ["tokens.micro_batch_size=2", "tokens.batch_accumulation_per_replica=3"]
    recipe = load_recipe("tiny", overrides).recipe
    assert resolve_topology(recipe) == resolve_topology(recipe, 2)
    with pytest.raises(UserError, match="batch_accumulation_per_replica: 3: expected 2"):
        resolve_topology(recipe, 3)


def test_the_batch_stays_at_another_dp() -> None:
    file_like = ["parallelism.dp=3", "tokens.global_batch_size=null", "tokens.batch_accumulation_per_replica=2"]
    recipe = load_recipe("tiny", [*file_like, "tokens.micro_batch_size=4"]).recipe
    assert global_batch_size(recipe) == 24
    other = with_data_parallel(recipe, 2)
    assert global_batch_size(other) == 24 and resolve_topology(other, 2).num_micro_batches == 3
