"""Lineage and guard: what is written, what is checked, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tiny_model import write_base, write_chat

from posttraining import lineage
from posttraining.cli import main
from posttraining.errors import Mistake
from posttraining.guard import require_sft


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def spoil(folder: Path) -> None:
    """Change one byte of the weights."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_hash_is_of_the_lines_of_all_files_sorted_by_name(tmp_path: Path) -> None:
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("c.txt", b"three")):
        (tmp_path / name).write_bytes(content)
    digest = {name: hashlib.sha256(name).hexdigest() for name in (b"one", b"two")}
    lines = f"{digest[b'one']}  a.safetensors\n{digest[b'two']}  b.safetensors\n"
    assert lineage.weights_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_stage_is_appended_with_its_parent_and_the_versions(chat: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    shutil.copytree(chat, child)
    (child / lineage.FILE).unlink()
    lineage.append(child, chat, "prefer", {"beta": 0.1}, "f" * 64, forced="because")
    stages = lineage.read(child)
    assert stages is not None
    assert [stage["stage"] for stage in stages] == ["pretrain", "sft", "prefer"]
    last = stages[-1]
    assert (last["parent"], last["weights_sha256"]) == (lineage.weights_sha256(chat), lineage.weights_sha256(child))
    assert (last["config"], last["data_fingerprint"], last["forced"]) == ({"beta": 0.1}, "f" * 64, "because")
    assert {"python", "trl", "transformers", "torch"} <= set(last["versions"])
    assert "forced" not in stages[1]


def test_a_merge_has_the_stages_of_all_parents_once(chat: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(chat, other)
    (other / lineage.FILE).unlink()
    lineage.append(other, chat, "grpo", {}, None)
    merged = tmp_path / "merged"
    shutil.copytree(chat, merged)
    (merged / lineage.FILE).unlink()
    lineage.append(merged, [other, chat], "merge", {}, None)
    assert lineage.stage_names(merged) == ["pretrain", "sft", "grpo", "merge"]
    stages = lineage.read(merged)
    assert stages is not None
    assert stages[-1]["parent"] == [lineage.weights_sha256(other), lineage.weights_sha256(chat)]


def test_the_guard_lets_weights_pass_that_had_sft(chat: Path) -> None:
    assert require_sft(chat, "grpo", None) is None
    assert require_sft(chat, "grpo", "no need") is None, "a reason that was not needed is not recorded"


def test_the_guard_says_what_is_wrong(chat: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(Mistake, match=r"sft is missing \(it had pretrain\); run `posttraining sft` before grpo"):
        require_sft(base, "grpo", None)
    spoil(chat)
    with pytest.raises(Mistake, match="its weights are not those"):
        require_sft(chat, "grpo", None)
    (chat / lineage.FILE).unlink()
    with pytest.raises(Mistake, match="has no training_lineage"):
        require_sft(chat, "grpo", None)
    assert require_sft(chat, "grpo", " it came from elsewhere ") == "it came from elsewhere"
    with pytest.raises(Mistake):
        require_sft(chat, "grpo", "  ")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "stages": []}', '{"format": 1, "stages": [{}]}'])
def test_a_lineage_that_cannot_be_read_is_refused(content: str, chat: Path) -> None:
    (chat / lineage.FILE).write_text(content)
    with pytest.raises(Mistake, match="not a lineage of format 1"):
        require_sft(chat, "grpo", None)


@pytest.mark.parametrize("command", ["grpo", "prefer", "compare"])
def test_commands_refuse_the_pretrained_export_and_edited_weights(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "pairs.jsonl"
    turns = {"prompt": [{"role": "user", "content": "a"}], "answer": "1"}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows.write_text(json.dumps({**turns, **sides}) + "\n")
    spoil(chat)
    for folder, said in (
        (write_base(tmp_path / "base"), "the stage sft is missing (it had pretrain)"),
        (chat, "its weights are not those that training_lineage.json names"),
    ):
        words = [f"model={folder}", f"output_dir={tmp_path / 'out'}", f"data={{path: {rows}}}"]
        with pytest.raises(SystemExit) as ended:
            main([command, "tiny", *(word for text in words for word in ("--set", text))])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
