"""Megatron-core's files as shards. They are written here by their documented layout."""

import shlex
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import corpus_recipe, random_documents, recipe_with

from data.manifest import read_manifest, write_manifest
from data.megatron import import_megatron, read_megatron_index, share_ending_in_eos
from data.plan import DataPlan
from data.shards import ShardReader
from data.tokenization import look_at_text, tokenize
from data.tokenizer import TokenizerInfo, train_tokenizer
from data.verification import expected_files, file_problem
from nanotron_recipes.errors import UserError
from nanotron_recipes.schema.data import Corpus

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "int32", **changes: Any
) -> None:
    """Documents of sequences of tokens; `changes` replace what the index should say."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    ends = np.cumsum([len(document) for document in documents], dtype="<i8")
    places = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    said: dict[str, Any] = {"version": 1, "code": CODES[dtype], "places": places, "bounds": np.append(0, ends)}
    said |= {"num_sequences": len(sequences), "num_bounds": len(ends) + 1, "magic": b"MMIDIDX\x00\x00"} | changes
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(
        np.array([token for sequence in sequences for token in sequence], dtype=np.dtype(dtype)).tobytes()
    )
    header = said["magic"] + struct.pack(
        "<QBQQ", said["version"], said["code"], said["num_sequences"], said["num_bounds"]
    )
    arrays = lengths.tobytes() + said["places"].astype("<i8").tobytes() + said["bounds"].astype("<i8").tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(header + arrays + said.get("rest", b""))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerInfo:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = {"path": str(folder), "sources": [{"name": "sums", "reader": "arithmetic", "documents": 60}]}
    return train_tokenizer(Corpus.model_validate(corpus), 300, folder / "tokenizer")


def documents_in(folder: Path) -> list[list[int]]:
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest.train, manifest.dtype, manifest.vocab_size)
    tokens, starts = reader.windows(np.array([0]), reader.num_tokens)
    return [part.tolist() for part in np.split(tokens[0], np.flatnonzero(starts[0])[1:])]


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64", "int16"])
def test_documents_come_back_whatever_type_they_were_written_with(
    tokenizer: TokenizerInfo, tmp_path: Path, dtype: str
) -> None:
    documents = random_documents(1, 40, 30, vocab_size=300)
    write_megatron(tmp_path / "all", [[document] for document in documents], dtype)
    counted: list[int] = []
    manifest = import_megatron(tmp_path / "all", tmp_path / "shards" / "web", tokenizer, counted.append)
    assert documents_in(tmp_path / "shards" / "web") == documents
    assert (manifest.source, manifest.dtype, manifest.train.documents) == ("web", "uint16", 40)
    assert sum(counted) == (tmp_path / "all.bin").stat().st_size
    assert manifest.tokenizer_sha256 == tokenizer.sha256 and manifest.eos_token_id == tokenizer.eos_token_id
    files = expected_files(tmp_path / "shards" / "web", manifest)
    assert len(files) == 2 and [file_problem(file) for file in files] == [None, None]
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["web"]


@given(documents=st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4), min_size=1, max_size=6))
def test_a_document_is_what_its_bounds_say_however_many_sequences_it_has(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("sequences")
    write_megatron(folder / "all", documents)
    joined = [[token for sequence in document for token in sequence] for document in documents]
    index = read_megatron_index(folder / "all.idx")
    assert np.diff(index.document_ends, prepend=0).tolist() == list(map(len, joined))


def test_documents_without_tokens_are_counted_and_left_out(tokenizer: TokenizerInfo, tmp_path: Path) -> None:
    write_megatron(tmp_path / "all", [[[]], [[1, 2], [3]], [], [[4, 0]], [[]]])
    manifest = import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    assert documents_in(tmp_path / "out") == [[1, 2, 3], [4, 0]]
    assert manifest.rejected == {"empty document": 3}
    assert share_ending_in_eos(tmp_path / "out", manifest) == 0.5


def test_a_large_vocabulary_takes_four_bytes(tokenizer: TokenizerInfo, tmp_path: Path) -> None:
    large = TokenizerInfo(tokenizer.folder, tokenizer.sha256, 100_000, tokenizer.eos_token, 0)
    write_megatron(tmp_path / "all", [[[99_999, 0]], [[70_000, 0]]])
    manifest = import_megatron(tmp_path / "all", tmp_path / "out", large)
    assert manifest.dtype == "uint32" and documents_in(tmp_path / "out") == [[99_999, 0], [70_000, 0]]


DOCUMENTS = [[[1, 2, 0]], [[3, 0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"no index of Megatron-core \(it does not begin with MMIDIDX\)"),
        ({"version": 2}, "version 2: expected version 1"),
        ({"code": 7}, r"token type 7 \(float32\): expected a type of whole numbers"),
        ({"code": 9}, r"token type 9 \(unknown\)"),
        ({"num_sequences": 3}, "bytes: expected .* for 3 sequences"),
        ({"rest": b"\0\0"}, "a multimodal index"),
        ({"rest": b"\0"}, r"all\.idx: 83 bytes: expected 82 for 2 sequences and 3 document bounds"),
        ({"places": np.array([0, 4])}, "expected sequences that lie one after the other"),
        ({"bounds": np.array([0, 2, 1])}, "expected document bounds that rise from 0 to the 2 sequences"),
        ({"bounds": np.array([0, 1, 1])}, "expected document bounds that rise"),
        ({"code": 5, "places": np.array([0, 24])}, r"all\.bin: 20 bytes: expected 40 for the 5 int64"),
    ],
)
def test_an_index_that_cannot_be_is_refused(
    tokenizer: TokenizerInfo, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_megatron(tmp_path / "all", DOCUMENTS, **changes)
    with pytest.raises(UserError, match=message):
        import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_tokenizer_a_cut_file_and_a_taken_place_are_refused(
    tokenizer: TokenizerInfo, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "all", [[[1, 300, 0]]])
    with pytest.raises(UserError, match=r"all\.bin: token 1 is 300: expected 0 to 299"):
        import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    write_megatron(tmp_path / "all", [[[1, -1, 0]]])
    with pytest.raises(UserError, match=r"token 1 is -1"):
        import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.bin", "all.idx"], "nothing half-written is left"
    write_megatron(tmp_path / "all", DOCUMENTS)
    (tmp_path / "all.bin").write_bytes((tmp_path / "all.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"all\.bin: 18 bytes: expected 20 for the 5 int32 of its \.idx"):
        import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    write_megatron(tmp_path / "all", DOCUMENTS)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: expected a new folder"):
        import_megatron(tmp_path / "all", tmp_path / "out", tokenizer)
    (tmp_path / "all.bin").unlink()
    with pytest.raises(UserError, match=r"all\.bin: no such file"):
        import_megatron(tmp_path / "all", tmp_path / "other", tokenizer)
    for content, message in ((b"", "empty"), (b"MMI", "no index of Megatron-core")):
        (tmp_path / "all.idx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            import_megatron(tmp_path / "all", tmp_path / "other", tokenizer)


@pytest.mark.parametrize("says_who_made_it", [True, False])
def test_tokenize_does_not_replace_imported_shards_and_names_them(
    tokenizer: TokenizerInfo, tmp_path: Path, says_who_made_it: bool
) -> None:
    write_megatron(tmp_path / "all", DOCUMENTS)
    manifest = import_megatron(tmp_path / "all", tmp_path / "corpus" / "sums", tokenizer)
    if not says_who_made_it:
        write_manifest(tmp_path / "corpus" / "sums", manifest.model_copy(update={"made_by": None}))
    before = {path: path.read_bytes() for path in (tmp_path / "corpus" / "sums").iterdir()}
    recipe = corpus_recipe(tmp_path / "corpus", [{"name": "sums", "reader": "arithmetic", "documents": 60}])
    with pytest.raises(UserError, match=r"did not make 00000\.ds, 00000\.ds\.index, manifest\.json in there"):
        tokenize(recipe, "mine", workers=1)
    assert {path: path.read_bytes() for path in (tmp_path / "corpus" / "sums").iterdir()} == before
    (line,) = look_at_text(recipe).outdated
    assert line.endswith("its shards were not made by `tokenize`")


def run(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", "from launch.cli.main import main; main()", "data", "import-megatron"]
    return subprocess.run([*command, *arguments], cwd=where, capture_output=True, text=True, timeout=60)


def test_a_prefix_without_a_name_is_a_mistake(tmp_path: Path) -> None:
    for prefix in (".", "..", "/", ".idx"):
        done = run(prefix, "web", "--tokenizer", "absent", where=tmp_path)
        expected = f"error: {prefix}: expected the .bin and .idx files, without their endings\n"
        assert (done.returncode, done.stderr) == (2, expected)


def test_the_command_makes_a_folder_that_a_run_reads(tokenizer: TokenizerInfo, tmp_path: Path) -> None:
    documents = [[*document, 0] for document in random_documents(1, 40, 30, vocab_size=300)]
    write_megatron(tmp_path / "web_text_document", [[document] for document in documents[:-1]] + [[[5, 6]]])
    done = run("web_text_document.bin", "web", "--tokenizer", str(tokenizer.folder), where=tmp_path)
    assert done.returncode == 0, done.stderr
    note, made, following = done.stdout.strip().splitlines()
    assert note.startswith("note: 2.5% of the documents do not end with <|endoftext|>")
    assert made.startswith("web: ") and "in 40 documents, none of them held out for validation" in made
    assert shlex.split(following)[-1] == "data_stages.0.data.dataset.dataset_folder=[web]"
    recipe = recipe_with([(1, {str(tmp_path / "web"): 1.0})], vocab_size=300, train_steps=3)
    batch = DataPlan.from_recipe(recipe).step(1, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=12)
    assert batch.micro_batches[0].input_ids.shape == (12, 8)
