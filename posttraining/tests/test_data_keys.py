"""Keys of `data`: each does what its text says in the stages that have a use for it, and is refused in the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import QUESTION, write_rows
from test_grpo import config
from test_mistakes import error_of
from tiny_model import write_chat

from posttraining import grpo
from posttraining.datasets import DataSettings, SourceSettings, load_data, load_held_out
from posttraining.errors import Mistake

SEEN: list[tuple[str, int, str]] = []


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


def by_difficulty(
    completions: list[Any], difficulty: list[int], domain: list[str] | None = None, **columns: Any
) -> list[float]:
    """A reward that needs one column of the data and takes another."""
    SEEN.extend(zip(columns["answer"], difficulty, domain or [""] * len(difficulty), strict=True))
    return [level / len(one[0]["content"]) for one, level in zip(completions, difficulty, strict=True)]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_reward_gets_the_columns_that_it_has_as_parameters(mixed: bool, chat: Path, tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answer": str(number), "difficulty": 1 + number, "x": 0} for number in range(8)]
    path = str(write_rows(tmp_path / "rows.jsonl", [{**row, "domain": f"of {row['answer']}"} for row in rows]))
    data = {"sources": [{"path": path}]} if mixed else {"path": path}
    SEEN.clear()
    grpo.run(config(tmp_path, chat, data=data, rewards=[{"path": "test_data_keys.by_difficulty"}], max_steps=2))
    assert len(SEEN) == 2 * 8
    assert all(difficulty == 1 + int(answer) and domain == f"of {answer}" for answer, difficulty, domain in SEEN)


def test_a_column_that_a_reward_needs_and_no_row_has_is_named(chat: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "1"}]))
    reward = {"path": "test_data_keys.by_difficulty"}
    with pytest.raises(Mistake, match="row 0 has no 'difficulty', which the reward test_data_keys"):
        grpo.run(config(tmp_path, chat, data={"path": rows}, rewards=[reward]))


def test_held_out_rows_have_the_columns_that_the_others_have(tmp_path: Path) -> None:
    pair = {"question": QUESTION, "good": "5", "bad": "6"}
    columns = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    path, held_out = (str(write_rows(tmp_path / name, [pair, pair])) for name in ("a.jsonl", "b.jsonl"))
    settings = DataSettings(path=path, held_out_path=held_out, columns=columns)
    rows, apart = load_data(settings, "pairs", "a.yaml"), load_held_out(settings, "pairs", "a.yaml")
    assert apart is not None and list(apart) == list(rows)
    write_rows(tmp_path / "b.jsonl", [{"question": QUESTION, "good": "5", "bat": "6"}])
    with pytest.raises(
        Mistake, match=r"data.columns: 'bad': no such column; expected one of data.held_out_path's: .* mean bat\?"
    ):
        load_held_out(settings, "pairs", "a.yaml")


def test_a_split_of_a_file_is_a_part_of_it(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(4)]))
    source = SourceSettings(path=path, split="train[1:3]")
    for settings in (DataSettings(path=path, split=source.split), DataSettings(sources=[source])):
        assert sorted(load_data(settings, "prompts")["prompt"]) == ["1", "2"]
    with pytest.raises(Mistake, match=r"data.path: .*: cannot be read: Unknown split \"test\"\. Should be one of"):
        load_data(DataSettings(path=path, split="test"), "prompts", "a.yaml")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"split": "train[:1]"}, "data.split: 'train[:1]': expected train; it is of data.path, which is not given"),
        ({"name": "SFT"}, "data.name: 'SFT': expected null; it is of data.path, which is not given"),
        (
            {"columns": {"problem": "prompt"}},
            "data.columns: {'problem': 'prompt'}: expected {}; they are of data.path and data.held_out_path, of which",
        ),
    ],
)
@pytest.mark.parametrize("source", ["sources", "generated"])
def test_what_is_of_a_file_alone_is_refused_beside_a_mixture_and_generated_rows(
    source: str, keys: dict[str, Any], said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "1"}]))
    data = {"sources": [{"path": path}]} if source == "sources" else {"generated": "arithmetic", "examples": 4}
    words = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {**data, **keys}}
    assert said in error_of("grpo", words, capsys)


def test_columns_are_read_for_held_out_rows_beside_a_mixture(tmp_path: Path) -> None:
    pair = {"prompt": QUESTION, "chosen": "5", "rejected": "6"}
    path = str(write_rows(tmp_path / "a.jsonl", [pair]))
    held_out = str(write_rows(tmp_path / "b.jsonl", [{"question": QUESTION, "chosen": "5", "rejected": "6"}]))
    source = SourceSettings(path=path)
    settings = DataSettings(sources=[source], held_out_path=held_out, columns={"question": "prompt"})
    apart = load_held_out(settings, "pairs")
    assert apart is not None and list(apart) == list(load_data(settings, "pairs")) == [pair]


def test_two_columns_with_one_name_are_refused(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "solution": "1"}]))
    data = {"path": path, "columns": {"problem": "prompt", "solution": "prompt"}}
    error = error_of("grpo", {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": data}, capsys)
    said = "data.columns: {'problem': 'prompt', 'solution': 'prompt'}: expected no two columns with one name, 'prompt'"
    assert said in error


@pytest.mark.parametrize(
    ("command", "mode_key"), [("pairs", "chosen.template"), ("grpo", "chat_template_kwargs"), ("evaluate", "mode")]
)
def test_what_has_no_effect_on_prompts_is_refused(
    command: str, mode_key: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "1"}]))
    for data, said in (
        ({"path": path, "held_out_path": path}, "data.held_out_path: "),
        (
            {"sources": [{"path": path}, {"path": path, "enable_thinking": False}]},
            f"data.sources.1.enable_thinking: false: expected null; here {mode_key} chooses the mode",
        ),
    ):
        keys: dict[str, Any] = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": data}
        if command == "pairs":
            keys["weak_model"] = str(chat)
        if command == "evaluate":
            task = {"name": "own", "data": data, "max_new_tokens": 3}
            keys = {"models": {"base": str(chat)}, "output_dir": str(tmp_path / "out"), "tasks": [task]}
        place = "tasks.0." if command == "evaluate" else ""
        error = error_of(command, keys, capsys)
        assert place + said in error
    assert not (tmp_path / "out").exists()
