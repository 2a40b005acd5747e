"""The last test: the distributed tests did run, all of them. A skipped or emptied test would otherwise pass unseen."""

from pathlib import Path

import pytest

MINIMUM = {"": 147, "long": 143}
"""Worlds that a whole `make test` and a whole `make test-long` run at least; raise them with the tests."""

ROOT = Path(__file__).resolve().parents[1]


def check_worlds(config: pytest.Config, tier: str) -> None:
    conftest = config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    worlds, collected = config.stash[conftest.WORLDS_RUN], config.stash[conftest.COLLECTED]
    assert [test for test in collected if test not in worlds] == [], "distributed tests that did not run"
    whole_tier = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole_tier:
        assert sum(worlds.values()) >= MINIMUM[tier], f"only {sum(worlds.values())} worlds were run"


def test_all_distributed_cases_ran(pytestconfig: pytest.Config) -> None:
    check_worlds(pytestconfig, "")


@pytest.mark.long
def test_all_long_distributed_cases_ran(pytestconfig: pytest.Config) -> None:
    check_worlds(pytestconfig, "long")
