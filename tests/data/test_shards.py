import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import random_documents, write_shard, write_source

from data.batch import fill_rows, micro_batch_from_windows
from data.manifest import Split, read_manifest
from data.shards import ShardReader
from nanotron_recipes.errors import UserError

FILES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=FILES, window=st.integers(1, 12), dtype=st.sampled_from(["uint16", "uint32"]))
def test_windows_are_the_concatenation_of_all_files(
    tmp_path: Path, lengths: list[list[int]], window: int, dtype: str
) -> None:
    documents = [[[1] * length for length in file] for file in lengths]
    number = 0
    for file in documents:
        for document in file:
            document[:] = range(number, number + len(document))
            number += len(document)
    shards = [write_shard(tmp_path, f"{i}.ds", file, dtype) for i, file in enumerate(documents)]
    reader = ShardReader(tmp_path, Split(files=tuple(shards)), dtype)
    assert (reader.num_tokens, reader.num_documents) == (number, sum(map(len, lengths)))
    starts = np.arange(0, max(0, number - window + 1), dtype=np.int64)
    tokens, document_starts = reader.windows(starts, window)
    first_tokens = [document[0] for file in documents for document in file]
    assert np.array_equal(tokens, starts[:, None] + np.arange(window))
    assert np.array_equal(document_starts, np.isin(tokens, first_tokens))
    assert [reader.is_document_start(place) for place in range(number)] == np.isin(range(number), first_tokens).tolist()
    expected = (~document_starts[:, 1:]).sum()
    assert reader.valid_targets(starts, window) == expected


def test_a_micro_batch_masks_document_starts_and_restarts_positions() -> None:
    tokens = np.arange(10, 19, dtype=np.int64)[None]
    starts = np.array([[False, False, True, False, False, True, True, False, True]])
    batch = micro_batch_from_windows(tokens, starts, restart_positions=True)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17]]
    assert batch.target_ids.tolist() == [[11, 12, 13, 14, 15, 16, 17, 18]]
    assert batch.target_mask.tolist() == [[True, False, True, True, False, False, True, False]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    plain = micro_batch_from_windows(tokens, starts, restart_positions=False)
    assert plain.position_ids.tolist() == [list(range(8))]
    assert np.array_equal(plain.target_mask, batch.target_mask)


def test_rows_that_fill_up_a_micro_batch_count_for_nothing() -> None:
    tokens = np.ones((1, 5), dtype=np.int64)
    batch = micro_batch_from_windows(tokens, np.zeros((1, 5), dtype=np.bool_), restart_positions=True)
    filled = fill_rows(batch, 3)
    assert filled.input_ids.shape == (3, 4) and filled.target_mask.sum() == 4


def test_a_truncated_shard_is_found_when_it_is_opened(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    path = tmp_path / "source" / "00000.ds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=rf"00000\.ds: {size - 6} bytes found, {size} expected"):
        ShardReader(tmp_path / "source", manifest.train, manifest.dtype)


def test_a_truncated_index_is_found_when_it_is_opened(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    path = tmp_path / "source" / "00000.ds.index"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"00000\.ds\.index: 152 bytes found, 160 expected"):
        ShardReader(tmp_path / "source", manifest.train, manifest.dtype)


def test_an_index_of_other_tokens_is_found_when_it_is_opened(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    path = tmp_path / "source" / "00000.ds.index"
    content = np.frombuffer(path.read_bytes(), dtype=np.uint64) + np.uint64(1)
    path.write_bytes(content.tobytes())
    with pytest.raises(UserError, match="the last document ends at token"):
        ShardReader(tmp_path / "source", manifest.train, manifest.dtype)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    (tmp_path / "source" / "00000.ds").unlink()
    with pytest.raises(UserError, match=r"00000\.ds: no such file"):
        ShardReader(tmp_path / "source", manifest.train, manifest.dtype)


def test_a_folder_or_a_forbidden_file_in_the_place_of_a_shard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    path = tmp_path / "source" / "00000.ds"

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(UserError, match=r"00000\.ds: cannot be read: Permission denied"):
            ShardReader(tmp_path / "source", manifest.train, manifest.dtype)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"00000\.ds: (\d+ bytes found|cannot be read: Is a directory)"):
        ShardReader(tmp_path / "source", manifest.train, manifest.dtype)


def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_place(tmp_path: Path) -> None:
    files = [[[1, 2, 3]], [[4, 5], [6, 999, 8]]]
    manifest = write_source(tmp_path, files)
    reader = ShardReader(tmp_path, manifest.train, manifest.dtype, vocab_size=100)
    assert reader.windows(np.array([0, 3]), 3)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(UserError, match=r"00001\.ds: token 999 at position 3, but the vocabulary has 100 entries"):
        reader.windows(np.array([0, 4]), 4)


def test_document_ends_that_do_not_rise_are_found_where_they_are_read(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [[[1] * 4 for _ in range(20)]])
    index = tmp_path / "00000.ds.index"
    ends = np.fromfile(index, dtype=np.uint64)
    for damage in (ends[[0, 1, 2, 3, 4, 6, 5, *range(7, 20)]], np.where(ends == 24, 20, ends)):
        index.write_bytes(damage.astype(np.uint64).tobytes())
        reader = ShardReader(tmp_path, manifest.train, manifest.dtype)
        assert reader.windows(np.array([40]), 30)[1].sum() == 8
        with pytest.raises(UserError, match=r"00000\.ds\.index: document ends after token 10 do not rise"):
            reader.windows(np.array([10]), 30)


def test_counts_that_no_window_can_have_are_found(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [[[1] * 4 for _ in range(20)]])
    index = tmp_path / "00000.ds.index"
    ends = np.fromfile(index, dtype=np.uint64)
    index.write_bytes(np.where(ends < 72, 5, ends).astype(np.uint64).tobytes())
    reader = ShardReader(tmp_path, manifest.train, manifest.dtype)
    with pytest.raises(UserError, match=r"00000\.ds\.index: document ends after token 0 do not rise"):
        reader.valid_targets(np.array([0]), 9)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    assert read_manifest(tmp_path / "source") == manifest


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = write_source(tmp_path / "a", [random_documents(1, 20, 30)])
    second = write_source(tmp_path / "b", [random_documents(1, 20, 30)])
    other = write_source(tmp_path / "c", [random_documents(2, 20, 30)])
    assert first.fingerprint == second.fingerprint != other.fingerprint
    (file,) = first.train.files
    for changes in ({"tokens": file.tokens + 1, "size": file.size + 2}, {"documents": 19}, {"index_sha256": "1"}):
        train = Split(files=(file.model_copy(update=changes),))
        assert first.model_copy(update={"train": train}).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens": 3', '"tokens": 4', r"the file: 00000\.ds: 6 bytes cannot be 4 tokens of uint16 in 2 documents"),
        ('"documents": 2', '"documents": 4', r"cannot be 3 tokens of uint16 in 4 documents"),
        ('"tokens": 3', '"tokens": 0', r"train\.files\.0\.tokens: Input should be greater than or equal to 1"),
        ('"tokens": 3', '"tokens": -3', "greater than or equal to 1"),
        ('"tokens": 3', '"tokens": "x"', r"train\.files\.0\.tokens: Input should be a valid integer"),
        ('"00000.ds"', '"../00000.ds"', r"train\.files\.0\.name: expected a file inside the source's folder"),
        ('"00000.ds"', '"/00000.ds"', "expected a file inside"),
        ('"uint16"', '"uint32"', "6 bytes cannot be 3 tokens of uint32"),
        ('"uint16"', '"float"', "dtype: Input should be"),
        ("{", "\udcff", "the file: "),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_source(tmp_path, [[[1, 2], [3]]])
    path = tmp_path / "manifest.json"
    changed = path.read_text().replace(old, new, 1)
    path.write_bytes(changed.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "the file: "), ('{"format_version": 2}', "format_version"), ('{"format_version": 1}', "source: ")],
)
def test_a_broken_manifest_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "./00000.ds"}, "train.files.0.name: expected a file inside"),
        ({"name": "a/"}, "train.files.0.name: expected a file inside"),
        ({"name": "manifest.json"}, "manifest.json: expected files of different names"),
        ({"name": "validation/00000.ds"}, "validation/00000.ds: expected files of different names"),
        ({"name": "validation/00000.ds.index"}, "validation/00000.ds: expected files of different names"),
        ({"tokens": 10**30, "size": 2 * 10**30}, "train.files.0.size: Input should be less than or equal to"),
    ],
)
def test_files_of_a_manifest_have_names_and_sizes_that_files_can_have(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = write_source(tmp_path, [[[1, 2, 3]]]).model_dump(mode="json")
    content["train"]["files"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert message in str(caught.value)
