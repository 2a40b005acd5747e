"""What the tests of whole runs share: one small corpus, tokenized once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_store import CheckpointStore, checkpoint_store
from s3_server import set_credentials
from small_pretraining import Process, StartProcess, small_recipe, write_recipe, write_text

from data.tokenization import tokenize
from nanotron_recipes.loading import load_recipe


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `small.yaml`, its text and its tokenized corpus; nobody writes there."""
    folder = tmp_path_factory.mktemp("small")
    write_text(folder)
    file = write_recipe(folder / "small.yaml", small_recipe(folder))
    tokenize(load_recipe(str(file)).recipe, "small")
    return folder


@pytest.fixture(scope="session")
def small_file(small_folder: Path) -> Path:
    """The small recipe; it may be used from any working directory."""
    return small_folder / "small.yaml"


@pytest.fixture
def small_mapping(small_folder: Path) -> dict[str, Any]:
    """The small recipe as a mapping, to be changed at will."""
    return small_recipe(small_folder)


@pytest.fixture(scope="module")
def start_process() -> Iterator[StartProcess]:
    """Start a process; none outlives the tests."""
    started: list[Process] = []

    def start(*arguments: Any, **keywords: Any) -> Process:
        started.append(Process(*arguments, **keywords))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointStore]:
    """A store of checkpoints that lets us in."""
    set_credentials(monkeypatch)
    with checkpoint_store() as running:
        yield running


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    """A file system of 4 MB."""
    return mount("4m")
