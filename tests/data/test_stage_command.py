"""`data stage` and `data verify` of copies, as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_store import Store, store
from small_data import random_documents, recipe_with, write_source

from launch.cli.transfer_progress import progress_line
from nanotron_recipes.loading import dump_yaml

__all__ = ["store"]
RUN = "from launch.cli.main import main; main()"


def run(*arguments: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe that reads ${SHARDS}/words, and such a source on a file system that all nodes see."""
    write_source(tmp_path / "shared/words", [random_documents(i, 100, 50) for i in range(4)])
    recipe = recipe_with([(1, {"${SHARDS}/words": 1.0})], sequence_length=8, global_batch_size=64, train_steps=10)
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    return tmp_path


def test_stage_says_what_it_does_and_what_comes_next_and_verify_knows_the_copies(folder: Path) -> None:
    given = ["mine.yaml", "--set", f"variables.SHARDS={folder}/shared", "--set", "data_staging.path=nvme"]
    early = run("data", "verify", *given, where=folder)
    assert early.returncode == 2 and "not staged yet; run `nanotron-recipes data stage RECIPE`" in early.stderr
    done = run("data", "stage", *given, where=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-3].startswith("1 source: ") and "; to be staged: " in lines[-3]
    assert lines[-2].startswith("staged: 10 files of ") and lines[-2].endswith("bytes/s); 0 were there")
    assert lines[-1].endswith(f"nanotron-recipes pretrain mine.yaml {' '.join(given[1:])}")
    again = run("data", "stage", *given, where=folder)
    assert again.returncode == 0 and "staged: 0 files" in again.stdout and "; 10 were there" in again.stdout
    copies = folder / "nvme" / folder.relative_to("/") / "shared/words"
    assert run("data", "verify", *given, where=folder).stdout.startswith("10 of 10 files")
    content = bytearray((copies / "00002.ds").read_bytes())
    content[7] ^= 1
    (copies / "00002.ds").write_bytes(content)
    verified = run("data", "verify", *given, where=folder)
    assert verified.returncode == 1
    assert f"{Path('nvme') / copies.relative_to(folder / 'nvme')}/00002.ds: its content is not" in verified.stdout
    follows = verified.stdout.splitlines()[-1].removeprefix("next: ")
    assert follows.startswith("rm -f nvme/") and f"nanotron-recipes data stage {' '.join(given)}" in follows
    (folder / follows.split()[2]).unlink()
    assert run("data", "stage", *given, where=folder).returncode == 0
    assert run("data", "verify", *given, where=folder).stdout.startswith("10 of 10 files")


def test_what_the_recipe_lacks_is_named(folder: Path) -> None:
    unset = run("data", "stage", "mine.yaml", where=folder)
    assert (unset.returncode, unset.stderr.count("\n")) == (2, 1)
    assert "${SHARDS} is not set; expected --set variables.SHARDS=" in unset.stderr
    placeless = run("data", "stage", "mine.yaml", "--set", "variables.SHARDS=s3://shards/x", where=folder)
    assert placeless.returncode == 2 and "s3://shards/x/words: expected a dataset_read_path" in placeless.stderr
    here = run("data", "stage", "mine.yaml", where=folder, SHARDS=f"{folder}/shared")
    assert here.returncode == 0 and here.stdout.startswith("nothing to stage: every source is read where it is")


def test_a_store_is_read_with_the_recipes_endpoint_and_refusals_are_one_line(folder: Path, store: Store) -> None:
    store.upload(folder / "shared/words", f"{folder.name}/words")
    given = ["mine.yaml", "--set", "data_staging.path=nvme", "--set", f"data_staging.endpoint_url={store.url}"]
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "SHARDS": f"s3://shards/{folder.name}",
    }
    done = run("data", "stage", *given, where=folder, **environment)
    assert done.returncode == 0 and "staged: 10 files" in done.stdout, done.stderr
    assert not (folder / "nvme/s3/shards" / folder.name / "words/00000.ds").is_symlink()
    missing = run("data", "stage", *given, where=folder, **environment | {"SHARDS": "s3://shards/none"})
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "s3://shards/none/words: no manifest.json in it" in missing.stderr


def test_progress_says_how_much_how_fast_and_how_long_yet() -> None:
    line = progress_line(1_200_000_000_000, 24_000_000_000_000, 600)
    assert line == "1.20T of 24.0T bytes (5 %), 2.00B bytes/s, 3:10:00 left"
    assert progress_line(0, 0, 1) == "0 of 0 bytes (0 %)"
