import contextlib
import gzip
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer
from small_data import corpus_recipe, write_jsonl
from typer.testing import CliRunner

from data import tokenization_process
from data.manifest import read_manifest
from launch.cli.tokenize import tokenize
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml

APP = typer.Typer()
APP.command()(tokenize)


def recipe_file(folder: Path) -> Path:
    write_jsonl(folder / "texts" / "a.jsonl", 60)
    sources = [{"name": "words", "reader": "jsonl", "path": str(folder / "texts")}]
    path = folder / "mine.yaml"
    path.write_text(dump_yaml(corpus_recipe(folder / "corpus", sources)))
    return path


def test_the_command_makes_the_shards_and_says_what_is_next(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    changes = ["--set", f"corpus.path={tmp_path / 'elsewhere'}", "--set", "general.purpose=my own text"]
    result = CliRunner().invoke(APP, [str(path), *changes, "--workers", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    label, program, *arguments = shlex.split(result.output.strip().splitlines()[-1])
    assert label == "next:" and Path(program).name == "nanotron-recipes"
    assert arguments == ["pretrain", str(path), *changes], "the same data are the ones that it reads"
    assert read_manifest(tmp_path / "elsewhere" / "words").train.documents > 40


def test_nothing_is_left_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", 60)
    sources = [{"name": name, "reader": "jsonl", "path": str(tmp_path / "texts")} for name in ("one", "two")]
    path, scratch = tmp_path / "mine.yaml", tmp_path / "temporary"
    path.write_text(dump_yaml(corpus_recipe(tmp_path / "corpus", sources)))
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    assert CliRunner().invoke(APP, [str(path), "--workers", "2"], catch_exceptions=False).exit_code == 0
    assert list(scratch.iterdir()) == []


def damaged_gzip(folder: Path) -> Path:
    """A file whose end is missing, after more text than the tokenizer is trained on."""
    write_jsonl(folder / "many.jsonl", 9_000)
    path = folder / "texts" / "b.jsonl.gz"
    path.write_bytes(gzip.compress((folder / "many.jsonl").read_bytes())[:-200])
    return path


def test_a_damaged_file_is_named_although_a_worker_finds_it(tmp_path: Path) -> None:
    recipe, damaged = recipe_file(tmp_path), damaged_gzip(tmp_path)
    with pytest.raises(UserError, match=rf"{damaged.name}: damaged or not a jsonl file"):
        CliRunner().invoke(APP, [str(recipe), "--workers", "2"], catch_exceptions=False)
    assert not (tmp_path / "corpus" / "words").exists()


def test_a_failed_worker_ends_with_1_and_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_file(tmp_path)
    monkeypatch.setattr(tokenization_process, "_START", "raise OSError('No space left on device')")
    result = CliRunner().invoke(APP, [str(recipe), "--workers", "1"])
    assert result.exit_code == 1
    assert "worker.log" in result.output and "No space left on device" in result.output


def test_a_recipe_without_corpus_is_a_users_mistake(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    arguments = [str(path), "--set", "corpus=null", "--set", "tokenizer.train=null"]
    with pytest.raises(UserError, match="corpus: missing; there is nothing to tokenize"):
        CliRunner().invoke(APP, arguments, catch_exceptions=False)


def test_a_worker_that_the_system_kills_ends_the_command_instead_of_holding_it(tmp_path: Path) -> None:
    sources = [{"name": "sums", "reader": "arithmetic", "documents": 100_000}]
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml(corpus_recipe(tmp_path / "corpus", sources)))
    command = [sys.executable, "-P", "-c", "from launch.cli.main import main; main()"]
    process = psutil.Popen(
        [*command, "tokenize", str(path), "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(working := _with_open_shard(process)) == 0:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before a worker could be killed"
        time.sleep(0.02)
    started = process.children(recursive=True)
    working[0].kill()
    _, said = process.communicate(timeout=30)
    gone, alive = psutil.wait_procs(started, timeout=10)
    assert len(gone) > 3 and not alive, "no process that was started outlives the command"
    assert process.returncode == 1
    assert b"a worker was killed, as happens where memory is short: fewer --workers need less" in said


def _with_open_shard(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(file.path.endswith(".ds") for file in child.open_files()):
                found.append(child)
    return found
