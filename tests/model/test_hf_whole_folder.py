"""A folder appears whole or not at all, and nothing is removed that another process or a person made."""

import fcntl
import multiprocessing
import os
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import model.whole_folder
from model.whole_folder import whole_folder
from nanotron_recipes.errors import UserError

OWN = {"number", "again"}


def own_files(folder: Path) -> set[str]:
    """What `write` writes."""
    return OWN if (folder / "number").is_file() else set()


def write(out: Path, number: int, pause: float = 0.0) -> None:
    with whole_folder(out, own_files=own_files) as folder:
        (folder / "number").write_text(str(number))
        time.sleep(pause)
        (folder / "again").write_text(str(number))


def content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir()}


def _read_in(folder: int, name: str) -> str:
    with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
        return file.read()


def write_often(out: Path, number: int, enough: Event) -> None:
    while not enough.is_set():
        write(out, number, 0.001)


def read_whole(out: Path) -> str | None:
    """The number in both files; None where the folder is not there, or is replaced and removed meanwhile."""
    try:
        descriptor = os.open(out, os.O_RDONLY)  # one folder, whatever has its name afterwards
    except FileNotFoundError:
        return None
    try:
        number, again = (_read_in(descriptor, name) for name in ("number", "again"))
    except FileNotFoundError:
        return None
    finally:
        os.close(descriptor)
    assert number == again
    return number


def test_many_that_write_one_folder_at_once_never_mix_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    enough = context.Event()
    writers = [context.Process(target=write_often, args=(out, number, enough)) for number in range(3)]
    for writer in writers:
        writer.start()
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + 60
    try:
        while (len(seen) < 3 or seen.total() < 90) and time.monotonic() < deadline:
            if (number := read_whole(out)) is not None:
                seen[number] += 1
    finally:
        enough.set()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and seen.keys() == {"0", "1", "2"}
    assert len(set(content(out).values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_one_left_is_removed_and_what_lives_or_is_foreign_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dead = tmp_path / f".out.1-{'a' * 16}.partial"
    alive = tmp_path / f".out.2-{'b' * 16}.partial"
    foreign = [
        tmp_path / name for name in (".out.partial", f".other.1-{'a' * 16}.partial", f".out.1-{'a' * 15}.partial")
    ]
    for folder in (dead, alive, *foreign):
        folder.mkdir()
        (folder / "half").write_text("x")
    file = tmp_path / f".out.3-{'c' * 16}.partial"
    file.write_text("a file")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        write(out, 1)
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (out, alive, file, *foreign)
    )


def test_a_killed_process_holds_no_lock_any_more(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=write, args=(out, 1, 60))
    process.start()
    while not list(tmp_path.glob(".out.*.partial/number")):
        time.sleep(0.01)
    write(out, 2)
    assert len(list(tmp_path.iterdir())) == 2, "it still runs: its folder is left alone"
    process.kill()
    process.join()
    write(out, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and content(out)["number"] == "3"


@pytest.mark.parametrize("renames_in_one_step", [True, False])
def test_a_file_that_comes_at_the_last_moment_is_kept(
    renames_in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, exchange = tmp_path / "out", model.whole_folder._exchange
    write(out, 1)

    def a_person_was_faster(new: Path, old: Path) -> None:
        if not (old / "mine").exists() and not (new / "mine").exists():
            (old / "mine").write_text("mine")
        exchange(new, old)

    monkeypatch.setattr(model.whole_folder, "_exchange", a_person_was_faster)
    if not renames_in_one_step:
        monkeypatch.setattr(model.whole_folder.ctypes, "CDLL", lambda *_, **__: None)
    with pytest.raises(UserError, match="holds mine, which this command did not write"):
        write(out, 2)
    assert content(out) == {"number": "1", "again": "1", "mine": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_that_may_replace_nothing_loses_against_one_that_came_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is not empty"), whole_folder(out) as folder:
        (folder / "number").write_text("1")
        write(out, 2)
    assert content(out)["number"] == "2" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is not a folder"):
            write(tmp_path / name, 1)
