"""Wrong calls, as a user makes them: one line that names the nearest word, exit code 2, and no wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat_rows, write_rows
from tiny_model import write_chat

from posttraining.cli import main
from posttraining.settings import RECIPES

TINY = RECIPES / "tiny" / "sft.yaml"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says, without its `error: `."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft"], "sft: missing argument 'CONFIG'; see `posttraining sft --help`"),
        (["sft", "tiny", "--sett", "a=b"], "sft: --sett: no such option; did you mean --set?"),
        (["preview", "tiny", "-x"], "preview: -x: no such option; expected one of --set, --samples, --help"),
        (["sft", "tiny", "b"], "sft: got unexpected extra argument(s) (b); see `posttraining sft --help`"),
        (["sft", "tiny", "--set"], "option '--set' requires an argument; see `posttraining --help`"),
        (["--hlp"], "--hlp: no such option; did you mean --help?"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(words, capsys) == said


def test_a_command_that_is_none_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["sff", "tiny"], capsys)
    assert said.startswith("sff: no such command; expected one of sft, preview, pairs")
    assert said.endswith("did you mean sft?")


def test_a_call_without_a_command_shows_the_commands_and_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("learning_rat=1", "--set: learning_rat: unknown key; did you mean learning_rate?"),
        ("data.exampels=1", "--set: data.exampels: unknown key; did you mean data.examples?"),
        ("data={exampels: 1}", "--set: data.exampels: unknown key; did you mean data.examples?"),
        ("learning_rate=7", "--set: learning_rate: 7: expected a number above 0, at most 1"),
        ("early_at=2", "--set: early_at: 2.0: expected a share between 0 and 1"),
        ("output_dir=3", "--set: output_dir: 3: expected text"),
        ("data.held_out_path=/absent.jsonl", "--set: data.held_out_path: '/absent.jsonl': no such file"),
        (
            "data.path=a",
            f"{TINY}: data: expected one of data.path, data.sources and data.generated, not",
        ),
    ],
)
def test_a_mistake_of_set_is_not_the_files(
    word: str, said: str, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(["sft", "tiny", "--set", f"model={chat}", "--set", word], capsys).startswith(said)


def test_a_mistake_of_the_file_is_not_sets(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(1))
    common = f"model: {chat}\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {rows}}}\nuse_cpu: true\nbf16: false\n"
    for text, said in (
        ("learning_rat: 1\n", "learning_rat: unknown key"),
        ("max_length: 300\n", "max_length: 300: expected at most 256, the context"),
        ("early_at: 3\n", "early_at: 3.0: expected a share"),
        ("report_to: wandbb\nmax_length: 64\n", "report_to: 'wandbb': expected none, all or one of"),
    ):
        file.write_text(common + text)
        assert refused(["sft", str(file), "--set", "seed=3"], capsys).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    "words",
    [
        ["sft", "tyny"],
        ["sft", "tiny", "--set", "learning_rat=1"],
        ["sft", "tiny", "--set", "learning_rate=7"],
        ["grpo", "tiny", "--set", "rewards.0.pat=a"],
        ["preview", "tiny", "--set", "model=absent"],
        ["pairs", "tiny", "--set", "weak_model=absent"],
        ["prefer", "tiny", "--set", "data.path=absent.jsonl", "--set", "model=CHAT"],
        ["merge", "tiny", "--set", "models=[a]"],
        ["pipeline", "tiny", "--set", "stages.0.nam=a"],
        ["evaluate", "tiny", "--set", "models=[a]"],
    ],
)
def test_a_mistake_is_found_before_torch_is_imported(words: list[str], chat: Path, tmp_path: Path) -> None:
    words = [f"model={chat}" if word == "model=CHAT" else word for word in words]
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    path = os.pathsep.join([str(tmp_path), str(RECIPES.parent / "src")])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "posttraining", *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
