"""More shards than a process may have open files by default."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_data import recipe_with, write_source

from data.open_files import allow_open_files
from data.plan import DataPlan
from nanotron_recipes.errors import UserError


@pytest.fixture
def soft_limit() -> Iterator[int]:
    """The usual limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_source_of_more_shards_than_the_usual_limit_is_opened(soft_limit: int, tmp_path: Path) -> None:
    write_source(tmp_path / "many", [[[1] * 20] for _ in range(soft_limit)])
    recipe = recipe_with([(1, {str(tmp_path / "many"): 1.0})], sequence_length=8)
    assert DataPlan.from_recipe(recipe).sources[str(tmp_path / "many")].train.num_tokens == 20 * soft_limit


def test_more_than_the_system_allows_is_said() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 1 << 62 if before[1] == resource.RLIM_INFINITY else before[1]
    if hard == 1 << 62:
        pytest.skip("this system has no hard limit")
    with pytest.raises(UserError, match=r"files of shards are to be opened, and this process may open [\d,]+ \(ulimit"):
        allow_open_files(hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
