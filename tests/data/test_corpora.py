import errno
import gzip
import json
import os
import re
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from datatrove.io import DataFolder
from pydantic import ValidationError
from small_data import write_jsonl

from data.corpora import documents, shards_of
from data.python_text import module_files, prose_of
from data.rejected import Rejected
from data.text_files import files_of
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.schema.data import Corpus, CorpusSource


def corpus_of(**source: object) -> tuple[CorpusSource, Corpus]:
    corpus = Corpus.model_validate({"path": "unused", "sources": [{"name": "mine", **source}]})
    return corpus.sources[0], corpus


def texts(source: CorpusSource, corpus: Corpus, rejected: Rejected | None = None) -> list[str]:
    return [text for split in ("train", "validation") for text in documents(source, corpus, split, rejected=rejected)]


@pytest.mark.parametrize("reader", ["python-code", "arithmetic"])
def test_shards_share_a_split_without_loss(reader: str) -> None:
    source, corpus = corpus_of(reader=reader, **({"documents": 200} if reader == "arithmetic" else {}))
    whole = list(documents(source, corpus, "train"))
    parts = [list(documents(source, corpus, "train", shard=shard, shards=3)) for shard in range(3)]
    assert sorted(whole) == sorted(text for part in parts for text in part) and all(parts)


def test_code_and_prose_hold_out_the_same_modules() -> None:
    code, corpus = corpus_of(reader="python-code")
    prose, _ = corpus_of(reader="python-docs")
    held_out = list(documents(code, corpus, "validation"))
    trained = set(documents(code, corpus, "train"))
    assert 10 < len(held_out) < 60 and not trained & set(held_out)
    expected = {text for text in map(prose_of, held_out) if text}
    assert expected <= set(documents(prose, corpus, "validation"))


def test_modules_are_real_code_without_tests() -> None:
    names = [name for name, _ in module_files()]
    assert {"json/decoder.py", "argparse.py"} <= set(names) and len(names) > 300
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))


def test_prose_is_docstrings_and_longer_comments_in_their_order() -> None:
    code = (
        '"""A module\n    about things."""\n\n'
        "# This comment is long enough to read as a sentence of its own,\n# over two lines.\n"
        "# ----------------------------------------------------------------------------\n\n"
        "# short\n\ndef f():\n    '''Does it.'''\n    x = '# not a comment'\n"
    )
    prose = prose_of(code)
    assert prose.startswith("A module\nabout things.\n\nThis comment is long enough") and prose.endswith("Does it.")
    assert "short" not in prose and "not a comment" not in prose


def test_jsonl_is_read_plain_and_compressed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 30)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "sub" / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    source, corpus = corpus_of(reader="jsonl", path=str(tmp_path))
    assert len(shards_of(source)) == 3
    found = texts(source, corpus)
    assert len(found) == 90 and len(set(found)) == 30


def test_parquet_and_text_files_are_read(tmp_path: Path) -> None:
    rows = {"id": [1, 2, 3], "body": ["first text", "second text", "third text"]}
    pq.write_table(pa.table(rows), tmp_path / "part.parquet")
    (tmp_path / "one.txt").write_text("a page of text")
    (tmp_path / "two.md").write_text("another page")
    source, corpus = corpus_of(reader="parquet", path=str(tmp_path), text_key="body")
    assert sorted(texts(source, corpus)) == ["first text", "second text", "third text"]
    source, corpus = corpus_of(reader="text", path=str(tmp_path))
    assert sorted(texts(source, corpus)) == ["a page of text", "another page"]


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    good = json.dumps({"text": "good"}).encode()
    lines = [good, b'{"text": "cut off', b"[1]", b'{"content": "other key"}', b'{"text": " "}', b"\xff\xfe", b"", good]
    path.write_bytes(b"\n".join(lines))
    rejected = Rejected()
    source, corpus = corpus_of(reader="jsonl", path=str(path))
    assert list(documents(source, corpus, "train", rejected=rejected)) == ["good", "good"]
    assert rejected.counts == {
        "not a JSON object": 2,
        "no text under the text_key": 1,
        "empty text": 1,
        "not UTF-8": 1,
    }
    assert rejected.examples["not a JSON object"] == [f"{path}:{number}" for number in (2, 3)]
    assert rejected.examples["not UTF-8"] == [f"{path}:6"]
    assert rejected.keys_seen == {"content"}


def test_what_only_pythons_json_writes_is_read_where_the_text_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "one", "score": float("nan")},
        {"text": "two", "other \ud800": "\udfff", "big": 10**400, "least": float("-inf")},
        {"text": "half a pair: \ud83d"},
        {"text": float("nan")},
        {"\ud800": "no text"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    rejected = Rejected()
    source, corpus = corpus_of(reader="jsonl", path=str(path))
    assert list(documents(source, corpus, "train", rejected=rejected)) == ["one", "two"]
    assert rejected.examples == {
        "text with half of a surrogate pair": [f"{path}:3"],
        "a number under the text_key, not text": [f"{path}:4"],
        "no text under the text_key": [f"{path}:5"],
    }
    assert rejected.keys_seen == {"?"}


def test_the_number_of_documents_can_be_limited(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 30)
    source, corpus = corpus_of(reader="jsonl", path=str(tmp_path), documents=7)
    assert len(texts(source, corpus)) == 7 and len(shards_of(source)) == 1


def test_a_missing_path_and_a_folder_without_files_are_named(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "absent", "absent: no such file or folder"),
        (tmp_path, r"no file matches \*\*/\*\.jsonl or"),
        (None, "path: expected a file or a folder"),
    ]:
        source, corpus = corpus_of(reader="jsonl", path=None if path is None else str(path))
        with pytest.raises(UserError, match=message):
            list(documents(source, corpus, "train"))


def test_a_path_is_relative_to_the_working_directory_wherever_the_recipe_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"name": "mine", "reader": "text", "path": "texts"}]
    stage = {"name": "one", "start_training_step": 1, "data": {"dataset": {"dataset_folder": ["mine"]}}}
    tiny = yaml.safe_load(dump_yaml(load_recipe("tiny").recipe))
    tiny |= {"corpus": {"sources": sources}, "data_stages": [stage]}
    for folder, name in (("texts", "here"), ("recipes/texts", "beside the recipe")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.txt").touch()
    file = tmp_path / "recipes" / "my.yaml"
    file.write_text(yaml.safe_dump(tiny))
    monkeypatch.chdir(tmp_path)
    corpus = load_recipe(str(file)).recipe.corpus
    assert corpus is not None and corpus.path == "corpora/my"
    assert [each.name for each in files_of(corpus.sources[0]).files] == ["here.txt"]


@pytest.mark.parametrize("glob", ["/texts/*.jsonl", "**x", "a/***", "", "../*.jsonl"])
def test_a_glob_that_is_none_is_refused_with_its_value(tmp_path: Path, glob: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", 1)
    source, corpus = corpus_of(reader="jsonl", path=str(tmp_path), glob=glob)
    with pytest.raises(
        UserError, match=rf"corpus\.sources mine: glob: '{re.escape(glob)}': expected a pattern such as"
    ):
        list(documents(source, corpus, "train"))


def test_what_editors_and_notebooks_keep_is_read_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".mine"
    for name in ("a.txt", ".ipynb_checkpoints/a.txt", "more/._b.txt", "more/b.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".#a.txt").symlink_to("me@host.1234")  # an editor's lock
    assert texts(*corpus_of(reader="text", path=str(folder))) == ["a.txt", "more/b.txt"]
    assert texts(*corpus_of(reader="text", path=str(folder / "more" / "._b.txt"))) == ["more/._b.txt"]
    assert texts(*corpus_of(reader="text", path=str(folder), glob=".ipynb_checkpoints/*")) == [
        ".ipynb_checkpoints/a.txt"
    ]


def test_a_name_that_is_no_utf8_is_refused_and_any_other_is_read(tmp_path: Path) -> None:
    (tmp_path / "文 ä\n1.txt").write_text("some text")
    source, corpus = corpus_of(reader="text", path=str(tmp_path))
    assert texts(source, corpus) == ["some text"]
    (tmp_path / "\udcff.txt").write_text("more")
    with pytest.raises(UserError, match=r"\\udcff\.txt: expected names of files in UTF-8"):
        texts(source, corpus)


def test_links_to_nothing_are_named_and_loops_and_folders_are_no_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", 3)
    (tmp_path / "texts" / "folder.jsonl").mkdir()
    (tmp_path / "texts" / "up").symlink_to(tmp_path / "texts")
    source, corpus = corpus_of(reader="jsonl", path=str(tmp_path / "texts"))
    assert len(texts(source, corpus)) == 3
    (tmp_path / "texts" / "gone.jsonl").symlink_to(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl: a link to a file that is not there"):
        texts(source, corpus)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    source, corpus = corpus_of(reader="jsonl", path=str(loop))
    with pytest.raises(UserError, match="loop: no such file or folder"):
        texts(source, corpus)


@pytest.mark.parametrize("reader", ["jsonl", "text"])
def test_what_is_no_file_is_refused_and_not_waited_for(reader: str, tmp_path: Path) -> None:
    suffix = "jsonl" if reader == "jsonl" else "txt"
    (tmp_path / f"a.{suffix}").write_text('{"text": "x"}\n')
    pipe = tmp_path / f"b.{suffix}"
    os.mkfifo(pipe)
    for path, expected in ((tmp_path, "a file"), (pipe, "a file or a folder")):
        source = CorpusSource.model_validate({"name": "s", "reader": reader, "path": str(path)})
        with pytest.raises(UserError, match=rf"corpus\.sources s: \S+/{pipe.name}: expected {expected}, found a FIFO"):
            files_of(source)
    pipe.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(pipe))
        with pytest.raises(UserError, match="found a socket"):
            files_of(CorpusSource.model_validate({"name": "s", "reader": reader, "path": str(tmp_path)}))


def test_a_path_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    source, corpus = corpus_of(reader="jsonl", path="x" * 5000)
    with pytest.raises(UserError, match=r"path: 'x+…: cannot be looked through: File name too long"):
        texts(source, corpus)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "größe", "a b", "a\n", "x" * 101, "a:b"])
def test_a_source_has_a_name_that_every_file_system_takes(name: str) -> None:
    with pytest.raises(ValidationError, match="at most 100 letters a to z"):
        corpus_of(reader="arithmetic", name=name)
    assert corpus_of(reader="arithmetic", name="Web-3.1_en")[0].name == "Web-3.1_en"


def rejected_of(path: Path, reader: str = "jsonl", **changes: object) -> tuple[list[str], Rejected]:
    source, corpus = corpus_of(reader=reader, path=str(path), **changes)
    rejected = Rejected()
    whole = corpus.model_copy(update={"validation_fraction": 0.0})
    return list(documents(source, whole, "train", rejected=rejected)), rejected


def test_what_is_no_text_is_counted_by_its_kind(tmp_path: Path) -> None:
    values = ["[1]", "5", "1.5", "true", '{"a": 1}', "null"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": {value}}}\n' for value in values))
    found, rejected = rejected_of(tmp_path)
    kinds = {"a list": 1, "a number": 2, "true or false": 1, "an object": 1}
    expected = {f"{kind} under the text_key, not text": count for kind, count in kinds.items()}
    assert not found and rejected.counts == expected | {"no text under the text_key": 1} and not rejected.keys_seen


def test_parquet_names_its_columns_and_the_rows_that_cannot_be_used(tmp_path: Path) -> None:
    damaged = pa.array([b"\xff", b"ok"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": damaged, "n": [1, 2]}), tmp_path / "a.parquet")
    found, rejected = rejected_of(tmp_path, "parquet")
    assert found == ["ok"] and rejected.examples == {"not UTF-8": [f"{tmp_path / 'a.parquet'}:1"]}
    _, rejected = rejected_of(tmp_path, "parquet", text_key="body")
    assert rejected.counts == {"no text under the text_key": 2} and rejected.keys_seen == {"n", "text"}
    _, rejected = rejected_of(tmp_path, "parquet", text_key="n")
    assert rejected.examples == {
        "a number under the text_key, not text": [f"{tmp_path / 'a.parquet'}:{row}" for row in (1, 2)]
    }


@pytest.mark.parametrize(
    ("content", "count", "rejected"),
    [
        (b"", 0, {}),
        (b'\xef\xbb\xbf{"text": "a"}\n', 1, {}),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', 2, {}),
        (b'{"text": "a"}\r{"text": "b"}\r', 0, {"not a JSON object": 1}),
        (b'\0\0\0\n{"text": "a"}\n\0', 1, {"not a JSON object": 2}),
        ('{"text": "a"}\n'.encode("utf-16"), 0, {"not UTF-8": 1, "not a JSON object": 1}),
        (b'{"text": "\\ud800"}\n{"text": "a"}', 1, {"text with half of a surrogate pair": 1}),
        (b"[" * 100_000 + b'\n{"text": "a"}', 1, {"not a JSON object": 1}),
        (b'{"text": "\xff"}\n{"text": "a"}', 1, {"not UTF-8": 1}),
    ],
)
def test_odd_bytes_cost_their_own_line_alone(
    tmp_path: Path, content: bytes, count: int, rejected: dict[str, int]
) -> None:
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(content))
        found, left_out = rejected_of(tmp_path / name)
        assert (len(found), left_out.counts) == (count, rejected) and not any("\ufeff" in text for text in found)


def test_a_text_file_loses_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert rejected_of(tmp_path, "text")[0] == ["hello\r\n"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut off", "something else", "more at its end"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    content = b"".join(json.dumps({"text": f"text {number} {number**7}"}).encode() + b"\n" for number in range(2000))
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": content.decode().splitlines()}), path)
    else:
        path.write_bytes((gzip if name.endswith("gz") else zstandard).compress(content))  # type: ignore[attr-defined]
    whole = path.read_bytes()
    assert len(rejected_of(path, "parquet" if name.endswith("parquet") else "jsonl")[0]) == 2000
    path.write_bytes({"cut off": whole[:-100], "something else": content, "more at its end": whole + b"junk"}[damage])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: damaged or not a (jsonl|parquet) file"):
        rejected_of(path, "parquet" if name.endswith("parquet") else "jsonl")


def test_files_packed_in_several_parts_are_read_to_their_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 10)
    content = (tmp_path / "a.jsonl").read_bytes()
    for name, pack in (("b.jsonl.gz", gzip.compress), ("c.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(content) + pack(content))
        assert len(rejected_of(tmp_path / name)[0]) == 20


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, because root may read everything."""
    write_jsonl(tmp_path / "a.jsonl", 1)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a.jsonl")

    monkeypatch.setattr(DataFolder, "open", refused)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: Permission denied"):
        rejected_of(tmp_path)
