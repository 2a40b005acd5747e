"""A run whose checkpoints are uploaded, without any training: its folder, its checkpoints, an uploader in a thread."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.storage.state import read_state
from launch.storage.uploader import Uploader
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.checkpoints import S3Upload
from parallel.checkpoint_files import FileEntry, Manifest, write_manifest


def begun_run(folder: Path, recipe_file: Path, upload: S3Upload) -> tuple[RunFolder, Recipe]:
    """The folder of a run that was begun in `folder`, and its recipe."""
    recipe = load_recipe(str(recipe_file)).recipe.model_copy(update={"s3_upload": upload})
    run = RunFolder.of(folder / "runs", "run", recipe)
    run.path.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.write_recipe("general: {}\n", RunHeader("small", "", "", run="a1"))
    return run, recipe


def make_checkpoint(root: Path, step: int, nodes: tuple[str, ...] = (), copies: int = 1) -> None:
    """A checkpoint on the disks of nodes (`root/<node>`), or on the one disk `root`: as a save leaves it."""
    disks = [root / node for node in nodes] or [root]
    files = []
    for disk in disks:
        (disk / str(step)).mkdir(parents=True)
    for name in (".metadata", "state.json"):
        content = f"{name} of {step}".encode()
        for disk in disks:
            (disk / str(step) / name).write_bytes(content)
        files.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
    for number in range(len(disks)):
        content = os.urandom(1000 + number)
        homes = [(number + offset) % len(disks) for offset in range(copies)]
        for home in homes:
            (disks[home] / str(step) / f"__{number}_0.distcp").write_bytes(content)
        on = tuple(nodes[home] for home in homes) if nodes else ()
        files.append(FileEntry(f"__{number}_0.distcp", len(content), hashlib.sha256(content).hexdigest(), on))
    for disk in disks:
        write_manifest(disk / str(step), Manifest(step, "", {}, tuple(files)))


@contextmanager
def uploading(uploader: Uploader) -> Iterator[Uploader]:
    thread = threading.Thread(target=uploader.run)
    thread.start()
    try:
        yield uploader
    finally:
        uploader.stop()
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def uploaded(folder: RunFolder, node: str = "a") -> list[int]:
    state = read_state(folder.path, node)
    return [] if state is None else [one.step for one in state.uploaded]
