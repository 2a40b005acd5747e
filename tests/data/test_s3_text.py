"""Text from S3, shards to S3: a real server over HTTP, also one that fails."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ResponseStreamingError
from rich.console import Console
from s3_server import client_of, s3_server, set_credentials
from small_data import corpus_recipe, recipe_with, write_jsonl

from data import parts as parts_module
from data import s3_files, upload
from data.manifest import Manifest, read_manifest
from data.text_files import files_of
from data.tokenization import tokenize
from data.verification import expected_files
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import CorpusSource

BUCKET = "corpora"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    set_credentials(monkeypatch)
    with s3_server(BUCKET) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        yield client_of(port)


@pytest.fixture
def texts(client: Any, tmp_path: Path) -> Path:
    """A folder, and the same in the bucket."""
    folder = tmp_path / "texts"
    write_jsonl(folder / "lines" / "big.jsonl", 300)
    write_jsonl(folder / "lines" / ".old.jsonl", 300)
    rows = [f"document {row} " * 8 for row in range(60)]
    (folder / "rows").mkdir()
    pq.write_table(pa.table({"text": rows}), folder / "rows" / "a.parquet", row_group_size=7)
    for path in folder.rglob("*.*"):
        client.upload_file(str(path), BUCKET, f"texts/{path.relative_to(folder)}")
    return folder


def recipe_of(folder: Path, texts: str, **corpus: Any) -> Recipe:
    sources = [
        {"name": "lines", "reader": "jsonl", "path": f"{texts}/lines"},
        {"name": "rows", "reader": "parquet", "path": f"{texts}/rows/a.parquet"},
    ]
    return corpus_recipe(folder, sources, **corpus)


def test_text_on_s3_gives_the_shards_that_the_same_files_give(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 8192)
    local = tokenize(recipe_of(tmp_path / "local", str(texts)), "mine", workers=1)
    remote = tokenize(recipe_of(tmp_path / "remote", f"s3://{BUCKET}/texts"), "mine", workers=2)
    assert len(local[0].train.files) > 4
    for one, two in zip(local, remote, strict=True):
        assert one.train == two.train and one.validation == two.validation
        assert two.inputs is not None and two.inputs.path is not None and two.inputs.path.startswith("s3://corpora/")


def test_a_change_of_an_object_is_noticed(client: Any, texts: Path) -> None:
    source = CorpusSource.model_validate({"name": "a", "reader": "jsonl", "path": f"s3://{BUCKET}/texts"})
    before = files_of(source)
    assert [file.name for file in before.files] == ["lines/big.jsonl"]
    client.put_object(Bucket=BUCKET, Key="texts/lines/big.jsonl", Body=(texts / "lines/big.jsonl").read_bytes()[::-1])
    assert files_of(source) != before


@pytest.mark.usefixtures("client")
def test_what_is_not_on_s3_is_named() -> None:
    for path, message in (
        (f"s3://{BUCKET}/absent", "no such file or folder|no file matches"),
        ("s3://no-such-bucket-here/x", "NoSuchBucket|no such file"),
    ):
        source = CorpusSource.model_validate({"name": "a", "reader": "jsonl", "path": path})
        with pytest.raises(UserError, match=rf"corpus\.sources a: path: {path}: .*({message})"):
            files_of(source)


def test_an_object_that_is_cut_off_on_its_way_is_asked_for_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: the stream of a body breaks twice."""
    monkeypatch.setattr(s3_files, "_WAIT_SECONDS", 0)
    folder = s3_files.S3Files()
    whole, get_object, failed = folder.client.get_object, folder.client.get_object, []

    def cut_off(**wanted: Any) -> Any:
        answer = get_object(**wanted)
        if len(failed) < 2:
            failed.append(wanted)
            answer["Body"].read = _broken if len(failed) == 1 else (lambda: b"short")
        return answer

    def _broken() -> bytes:
        raise ResponseStreamingError(error="cut off")

    folder.client.get_object = cut_off
    assert whole is not cut_off
    with folder.open(f"{BUCKET}/texts/lines/big.jsonl") as file:
        assert file.read() == (texts / "lines" / "big.jsonl").read_bytes()
    assert len(failed) == 2


def in_bucket(client: Any, prefix: str) -> dict[str, bytes]:
    names = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    return {name.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}


def uploading(texts: Path, folder: Path, seed: int = 1) -> tuple[list[Manifest], str]:
    console = Console(width=500, file=io.StringIO(), record=True)
    recipe = recipe_of(folder, str(texts), upload_to=f"s3://{BUCKET}/out", seed=seed)
    return tokenize(recipe, "mine", workers=1, console=console), console.export_text()


def test_finished_sources_are_uploaded_with_their_manifest_last(client: Any, texts: Path, tmp_path: Path) -> None:
    manifests, said = uploading(texts, tmp_path / "mine")
    assert f"s3://{BUCKET}/out/lines: lines is there, read back and hashed" in said
    found = in_bucket(client, "out/")
    files = [file for manifest in manifests for file in expected_files(Path(manifest.source), manifest)]
    assert {str(file.path) for file in files} | {
        "lines/manifest.json",
        "rows/manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    } == set(found)
    for file in files:
        assert hashlib.sha256(found[str(file.path)]).hexdigest() == file.sha256
    times = {i["Key"]: i["LastModified"] for i in client.list_objects_v2(Bucket=BUCKET, Prefix="out/")["Contents"]}
    assert times["out/lines/manifest.json"] == max(time for key, time in times.items() if "/lines/" in key)
    assert Manifest.model_validate_json(found["lines/manifest.json"]) == read_manifest(tmp_path / "mine" / "lines")
    again, said = uploading(texts, tmp_path / "mine")
    assert again == manifests and "read back" not in said, "nothing is sent twice"


def test_an_upload_goes_on_and_one_with_other_settings_replaces_what_is_ours(
    client: Any, texts: Path, tmp_path: Path
) -> None:
    uploading(texts, tmp_path / "mine")
    for lost in ("lines/manifest.json", "lines/00000_00000_doc_shuffled.ds"):
        client.delete_object(Bucket=BUCKET, Key=f"out/{lost}")
    kept = in_bucket(client, "out/")
    kept_shard = (tmp_path / "mine" / "lines" / "00000_00000_doc_shuffled.ds").read_bytes()
    uploading(texts, tmp_path / "mine")
    assert in_bucket(client, "out/").items() > kept.items()
    manifests, _ = uploading(texts, tmp_path / "mine", seed=2)
    found = in_bucket(client, "out/")
    assert json.loads(found["lines/manifest.json"])["settings_sha256"] == manifests[0].settings_sha256
    files = [file for manifest in manifests for file in expected_files(Path(manifest.source), manifest)]
    assert {str(file.path): hashlib.sha256(found[str(file.path)]).hexdigest() for file in files} == {
        str(file.path): file.sha256 for file in files
    }
    assert found["lines/00000_00000_doc_shuffled.ds"] != kept_shard, "other shards than before"


def test_a_foreign_object_is_not_replaced(client: Any, texts: Path, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key="out/lines/00000_00000_doc_shuffled.ds", Body=b"precious")
    with pytest.raises(UserError, match=r"out/lines/00000_.*: expected a free place; `tokenize` did not make this"):
        uploading(texts, tmp_path / "mine")
    found = in_bucket(client, "out/lines/")
    assert found["00000_00000_doc_shuffled.ds"] == b"precious" and "manifest.json" not in found


def test_what_arrives_changed_is_found_and_gets_no_manifest(
    client: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault: the server stores another byte."""

    def spoiling(path: str, bucket: str, key: str, ExtraArgs: Any) -> None:
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= key.endswith(".ds")
        client.put_object(Bucket=bucket, Key=key, Body=bytes(content), **ExtraArgs)

    real = upload.s3_client

    def spoiled(**settings: Any) -> Any:
        made = real(**settings)
        made.upload_file = spoiling
        return made

    monkeypatch.setattr(upload, "s3_client", spoiled)
    with pytest.raises(UserError, match=r"\.ds: what has arrived is not what was sent"):
        uploading(texts, tmp_path / "mine")
    found = in_bucket(client, "out/")
    assert not [name for name in found if name.endswith((".ds", "manifest.json"))]


def test_a_shard_that_is_damaged_on_this_machine_is_named_and_gets_no_manifest(
    client: Any, texts: Path, tmp_path: Path
) -> None:
    tokenize(recipe_of(tmp_path / "mine", str(texts), seed=1), "mine", workers=1)
    shard = tmp_path / "mine" / "rows" / "00000_00000_doc_shuffled.ds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{shard}: its content is not .*; `nanotron-recipes data verify RECIPE`"):
        uploading(texts, tmp_path / "mine")
    found = in_bucket(client, "out/")
    assert "rows/manifest.json" not in found and f"rows/{shard.name}" not in found


def test_what_a_killed_upload_has_sent_is_read_back_before_a_manifest_names_it(
    client: Any, texts: Path, tmp_path: Path
) -> None:
    """Faults: a shard, and a manifest, of which other bytes have arrived than were sent with their sha256, and nobody
    was left to read them back."""
    manifests, _ = uploading(texts, tmp_path / "mine")
    sound = in_bucket(client, "out/")

    def spoil(name: str) -> None:
        metadata = client.head_object(Bucket=BUCKET, Key=f"out/{name}")["Metadata"]
        body = bytes([sound[name][0] ^ 1]) + sound[name][1:]
        client.put_object(Bucket=BUCKET, Key=f"out/{name}", Body=body, Metadata=metadata)

    client.delete_object(Bucket=BUCKET, Key="out/lines/manifest.json")
    for name in ("lines/00000_00000_doc_shuffled.ds", "tokenizer/tokenizer.json"):
        spoil(name)
    for _ in range(2):
        again, said = uploading(texts, tmp_path / "mine")
        assert again == manifests and in_bucket(client, "out/") == sound
        assert "lines is there, read back and hashed" in said and "rows is there" not in said
        spoil("lines/manifest.json")


def test_a_bucket_that_is_not_there_ends_in_one_line(texts: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "mine", str(texts), upload_to="s3://absent/out")
    with pytest.raises(UserError, match=r"corpus\.upload_to: s3://absent/out: .*(404|NoSuchBucket)"):
        tokenize(recipe, "mine", workers=1)
    assert read_manifest(tmp_path / "mine" / "lines"), "the shards are there; only the upload is to be done again"


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "bucket/prefix", "gs://a/b", "s3:///a"])
def test_another_place_to_upload_to_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"corpus\.upload_to: .* expected s3://bucket/prefix"):
        recipe_with(
            [(1, {"a": 1.0})],
            corpus={"path": "x", "sources": [{"name": "a", "reader": "arithmetic"}], "upload_to": url},
        )
