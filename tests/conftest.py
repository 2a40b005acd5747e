"""What the tests share: one pool of ranks for all distributed cases, and a small recipe that has every feature."""

import copy
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from parallel.rank_pool import RankPool

MAX_WORLD_SIZE = 8

WORLDS_RUN = pytest.StashKey[dict[str, int]]()
"""How many worlds each distributed test has run, by test id."""

COLLECTED = pytest.StashKey[list[str]]()
"""The distributed tests of this session, by test id."""

SKIPPED = pytest.StashKey[list[str]]()
"""Those of them that were skipped; the reason why is said."""

SMALL_RECIPE: dict[str, Any] = {
    "general": {"project": "tests", "seed": 3},
    "model": {
        "dtype": "float32",
        "init_method": {"std": 0.12},
        "make_vocab_size_divisible_by": 4,
        "model_config": {
            "vocab_size": 510,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "no_rope_layer": 4,
            "_use_doc_masking": True,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1.0e-6,
            "max_position_embeddings": 64,
            "hidden_act": "silu",
            "z_loss_enabled": False,
        },
    },
    "tokens": {"sequence_length": 32, "train_steps": 20, "global_batch_size": 24, "micro_batch_size": 4},
    "parallelism": {"dp": 1, "pp": 1, "tp": 1, "tp_mode": "REDUCE_SCATTER", "pp_engine": "1f1b"},
    "optimizer": {
        "zero_stage": 0,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "weight_decay_exclude_named_params": [".*token_embedding.*"],
        "learning_rate_scheduler": {
            "learning_rate": 1.0e-2,
            "lr_warmup_steps": 2,
            "lr_warmup_style": "linear",
            "lr_decay_style": "linear",
            "min_decay_lr": 0.0,
        },
    },
}
"""54,000 parameters: tied embeddings, a NoPE layer, GQA, document masks, a vocabulary that is padded (510 to 512)."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WORLDS_RUN] = {}
    config.stash[COLLECTED] = []
    config.stash[SKIPPED] = []
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # a make that a test calls is none of `make test`'s
        os.environ.pop(name, None)
    # Property tests have no deadline: how long an example takes is the machine's.
    settings.register_profile("any machine", settings(), deadline=None)
    settings.load_profile("any machine")


def pytest_report_header() -> str:
    return "tests marked `long` and `gpu` are deselected unless asked for: make test-long, make test-gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_distributed_count.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    distributed = [item.nodeid for item in session.items if "pool" in getattr(item, "fixturenames", ())]
    session.config.stash[COLLECTED].extend(distributed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.nodeid in item.config.stash[COLLECTED]:
        item.config.stash[SKIPPED].append(item.nodeid)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    worlds = config.stash[WORLDS_RUN]
    if worlds:
        terminalreporter.write_line(f"{len(worlds)} distributed tests ran {sum(worlds.values())} worlds of ranks")


@pytest.fixture(autouse=True)
def kept_signals() -> Iterator[None]:
    """What a test calls in this process may listen for signals, or ignore them as all its processes would then."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The processes behind `pool`; started by the first distributed test, once."""
    with RankPool(MAX_WORLD_SIZE) as pool:
        yield pool


@pytest.fixture
def pool(request: pytest.FixtureRequest, rank_pool: RankPool) -> Iterator[RankPool]:
    """Ranks for a distributed test; what it runs is counted, and `test_distributed_count.py` looks at the count."""
    before = rank_pool.num_worlds_run
    yield rank_pool
    request.config.stash[WORLDS_RUN][request.node.nodeid] = rank_pool.num_worlds_run - before


@pytest.fixture(scope="session")
def base_recipe() -> dict[str, Any]:
    """The small recipe as a mapping, as it is."""
    return SMALL_RECIPE


@pytest.fixture
def small_recipe() -> dict[str, Any]:
    """The small recipe as a mapping, to be changed at will."""
    return copy.deepcopy(SMALL_RECIPE)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system in memory, of a size such as `4m`, in the folder `disk` of the test.

    Where that cannot be done, since it takes root, the test is skipped, and fails where it must not be missed: in CI.
    """
    folder = tmp_path / "disk"

    def make(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            folder.rmdir()
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no disk of {size}: {done.stderr.strip()}")
        return folder

    yield make
    if folder.exists():
        subprocess.run(["umount", "--lazy", folder], check=True)
