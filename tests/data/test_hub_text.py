"""Text of a data set of the hub: the real client against a server that has a local folder of the same layout."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import hub_of
from small_data import corpus_recipe, recipe_with, write_jsonl

from data.manifest import read_manifest
from data.tokenization import tokenize
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml
from nanotron_recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
REVISION = "refs/convert/parquet"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for number in range(3):
        write_jsonl(folder / "lines" / f"{number}.jsonl", 40, seed=number)
        rows = [f"document {number} {row} " * 8 for row in range(40)]
        (folder / "data" / "en").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"content": rows}), folder / "data" / "en" / f"{number}.parquet")
    (folder / "data" / "de").mkdir()
    pq.write_table(pa.table({"content": ["another language"]}), folder / "data" / "de" / "0.parquet")
    return folder


@pytest.fixture(scope="module")
def hub(dataset: Path) -> Iterator[str]:
    with hub_of(dataset, "me/texts", REVISION) as address:
        yield address


def sources(path: str, revision: str | None) -> list[dict[str, str | None]]:
    at = {"path": path, "revision": revision}
    return [
        {"name": "rows", "reader": "parquet", "glob": "data/en/*.parquet", "text_key": "content", **at},
        {"name": "lines", "reader": "jsonl", **at},
    ]


def tokenize_in_a_process(recipe: Recipe, folder: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads HF_ENDPOINT when it is imported."""
    (folder / "mine.yaml").write_text(dump_yaml(recipe))
    command = [sys.executable, "-P", "-c", "from launch.cli.main import main; main()", "tokenize", "mine.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_a_data_set_gives_the_shards_that_its_files_give_and_its_revision_is_kept(
    dataset: Path, hub: str, tmp_path: Path
) -> None:
    recipe = corpus_recipe(tmp_path / "remote", sources("hf://datasets/me/texts", REVISION))
    done = tokenize_in_a_process(recipe, tmp_path, hub)
    assert done.returncode == 0, done.stderr
    local = tokenize(corpus_recipe(tmp_path / "local", sources(str(dataset), None)), "mine", workers=1)
    for manifest in local:
        remote = read_manifest(tmp_path / "remote" / manifest.source)
        assert remote.train == manifest.train and remote.validation == manifest.validation
        assert remote.inputs is not None and manifest.inputs is not None
        assert (remote.inputs.path, remote.inputs.revision) == ("hf://datasets/me/texts", REVISION)
        assert (remote.inputs.files, remote.inputs.bytes) == (manifest.inputs.files, manifest.inputs.bytes) and (
            remote.inputs.files == 3
        )
    again = tokenize_in_a_process(recipe, tmp_path, hub)
    assert again.returncode == 0 and "all sources are tokenized already" in again.stdout
    unreachable = tokenize_in_a_process(recipe, tmp_path, "http://127.0.0.1:9")
    assert unreachable.returncode == 0 and "the shards made before are used" in unreachable.stdout


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("hf://datasets/me/texts", "v9", "no such file or folder"),
        ("hf://datasets/me/absent", REVISION, "no such file or folder"),
        ("hf://datasets/me/texts/data/en", REVISION, "no file matches data/en/"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: str, tmp_path: Path, path: str, revision: str, message: str) -> None:
    done = tokenize_in_a_process(corpus_recipe(tmp_path / "mine", sources(path, revision)), tmp_path, hub)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: corpus.sources rows: path: {path.split('@')[0]}") and message in line


def recipe_reading(path: str, revision: str | None) -> Recipe:
    (source, _) = sources(path, revision)
    return recipe_with([(1, {"rows": 1.0})], corpus={"path": "mine", "sources": [source]})


def test_a_revision_is_asked_for_by_its_key_and_only_where_there_is_one() -> None:
    for revision in (None, ""):
        with pytest.raises(
            UserError, match=r"corpus\.sources\.0\.revision: .* expected the commit, tag or branch of hf://"
        ):
            recipe_reading("hf://datasets/me/texts", revision)
    for path in ("texts", "s3://bucket/texts"):
        with pytest.raises(UserError, match=r"corpus\.sources\.0\.revision: 'main': expected null: only an hf:// path"):
            recipe_reading(path, "main")


@pytest.mark.parametrize(
    "path", ["hf://me/texts", "hf://datasets/texts", "hf://datasets/me/texts@main", "http://a/b", "s3:///x", "gs://a/b"]
)
def test_another_url_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"corpus\.sources\.0\.path: .*expected a path of this machine, s3://"):
        recipe_reading(path, "main" if path.startswith("hf") else None)


def test_a_remote_source_needs_the_network_whatever_the_recipe_says() -> None:
    for path, revision in (("hf://datasets/me/texts", "main"), ("s3://bucket/texts", None)):
        corpus = recipe_reading(path, revision).corpus
        assert corpus is not None and corpus.sources[0].is_remote and not corpus.sources[0].needs_network
    corpus = recipe_reading("texts", None).corpus
    assert corpus is not None and not corpus.sources[0].is_remote
