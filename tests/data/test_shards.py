from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import random_documents, write_shard, write_source

from data.batch import fill_rows, micro_batch_from_windows
from data.manifest import Split, read_manifest
from data.shards import ShardReader
from nanotron_recipes.errors import UserError

FILES = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4)


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


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "source", [random_documents(1, 20, 30)])
    assert read_manifest(tmp_path / "source") == manifest


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = write_source(tmp_path / "a", [random_documents(1, 20, 30)])
    second = write_source(tmp_path / "b", [random_documents(1, 20, 30)])
    other = write_source(tmp_path / "c", [random_documents(2, 20, 30)])
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "the file: "), ('{"format_version": 2}', "format_version"), ('{"format_version": 1}', "source: ")],
)
def test_a_broken_manifest_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)
