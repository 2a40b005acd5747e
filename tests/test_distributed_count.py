"""The last test: the distributed tests did run, all of them. A skipped or emptied test would otherwise pass unseen."""

import os
from pathlib import Path

import pytest

MINIMUM = {"": 212, "long": 191}
"""Worlds that the tests of a whole `make test` and a whole `make test-long` run; raise them with the tests."""

SHARING = (
    "tests/launch/test_engine_parts.py::",
    "tests/launch/test_parity.py::test_the_reference_learns_and_clips",
    "tests/launch/test_rewind.py::test_a_branch_that_goes_on_inherits_the_ranges",
    "tests/launch/test_rewind.py::test_a_branch_of_a_checkpoint_on_a_nodes_own_disk_inherits_them_too",
)
"""How the ids of tests begin that may run no world of their own: they look at one that their module runs once."""

ROOT = Path(__file__).resolve().parents[1]


def check_worlds(config: pytest.Config, tier: str) -> None:
    conftest = config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    worlds, skipped = config.stash[conftest.WORLDS_RUN], config.stash[conftest.SKIPPED]
    expected = [test for test in config.stash[conftest.COLLECTED] if test not in skipped]
    assert not skipped or not os.environ.get("CI"), f"distributed tests that were skipped in CI: {skipped}"
    assert [test for test in expected if test not in worlds] == [], "distributed tests that did not run"
    emptied = [test for test in expected if worlds[test] == 0 and not test.startswith(SHARING)]
    assert emptied == [], "distributed tests that ran no world"
    whole_tier = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole_tier and not skipped:
        assert sum(worlds.values()) >= MINIMUM[tier], f"only {sum(worlds.values())} worlds were run"


def test_all_distributed_cases_ran(pytestconfig: pytest.Config) -> None:
    check_worlds(pytestconfig, "")


@pytest.mark.long
def test_all_long_distributed_cases_ran(pytestconfig: pytest.Config) -> None:
    check_worlds(pytestconfig, "long")
