"""Preference pairs: what is filtered and why, resumed, shared among processes, and said in the data card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ANSWER, QUESTION, overrides, write_rows

from posttraining import files as files_module
from posttraining import lineage
from posttraining.errors import Mistake, StageFailed
from posttraining.generation import Answer
from posttraining.pairs import answers as answers_module
from posttraining.pairs import stage
from posttraining.pairs.filters import Filters
from posttraining.pairs.prompts import Prompt
from posttraining.pairs.settings import FilterSettings

PROMPT = Prompt([{"role": "user", "content": QUESTION}], "5", held_out=False)
RIGHT = Answer(ANSWER, 20, stopped=True)
WRONG = Answer("<think>\n2+3=6\n</think>\n\\boxed{6}", 20, stopped=True)


def chosen_and_rejected(
    good: Answer | list[Answer], bad: Answer | list[Answer], **settings: Any
) -> tuple[Any, Filters]:
    filters = Filters(FilterSettings(**settings))
    as_list = [[one] if isinstance(one, Answer) else one for one in (good, bad)]
    return filters.choose(PROMPT, *as_list), filters


def said(text: str, tokens: int = 20) -> Answer:
    return Answer(text, tokens, stopped=True)


@pytest.mark.parametrize(
    ("good", "bad", "settings", "reason"),
    [
        (WRONG, WRONG, {"check": "exact"}, "chosen: wrong"),
        (RIGHT, RIGHT, {"check": "exact"}, "rejected: right"),
        (said("\\boxed{5}"), WRONG, {"check": "exact", "format": True}, "chosen: format"),
        (Answer(ANSWER, 20, stopped=False), WRONG, {}, "chosen: does not end"),
        (RIGHT, Answer("a", 20, stopped=False), {}, "rejected: does not end"),
        (RIGHT, said("a", 3), {"min_tokens": 4}, "rejected: length"),
        (RIGHT, said("a", 30), {"max_tokens": 25}, "rejected: length"),
        (RIGHT, said("a", 5), {"max_length_ratio": 3.0}, "lengths too different"),
        (RIGHT, said(ANSWER + "\n"), {}, "identical answers"),
        (said("I'm sorry, but no."), WRONG, {}, "chosen: refusal"),
        (RIGHT, said("<think>\nhm\n</think>\nAs an AI I can not add."), {}, "rejected: refusal"),
        (said("$\\boxed{\\frac{1}{2}}$"), WRONG, {"check": "math"}, "chosen: wrong"),
    ],
)
def test_an_answer_that_does_not_fit_is_left_out_for_its_reason(
    good: Answer, bad: Answer, settings: dict[str, Any], reason: str
) -> None:
    pair, filters = chosen_and_rejected(good, bad, **settings)
    assert pair is None
    assert dict(filters.reasons) == {reason: 1}


@pytest.mark.parametrize("check", ["exact", "math", "none"])
def test_a_right_and_a_wrong_answer_are_a_pair(check: str) -> None:
    assert chosen_and_rejected(RIGHT, WRONG, check=check)[0] == (RIGHT, WRONG)


def test_a_refusal_in_the_thoughts_does_not_count() -> None:
    thinking = said("<think>\nAs an AI I could refuse.\n</think>\n\\boxed{5}")
    assert chosen_and_rejected(thinking, WRONG)[0] == (thinking, WRONG)


def test_of_several_samples_the_first_that_fits_is_taken() -> None:
    pair, filters = chosen_and_rejected([WRONG, RIGHT], [RIGHT, WRONG, said("\\boxed{7}")], check="exact")
    assert pair == (RIGHT, WRONG)
    assert not filters.reasons


def test_an_answer_that_nobody_can_verify_is_no_pair() -> None:
    filters = Filters(FilterSettings(check="exact"))
    assert filters.choose(Prompt(PROMPT.turns, None, held_out=False), [RIGHT], [WRONG]) is None
    assert dict(filters.reasons) == {"chosen: cannot be verified": 1}


def keys(taught: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Eleven prompts in files of two, of which two say the same; two are kept apart."""
    rows = [{"prompt": QUESTION + " " * number, "answer": "5", "other": 1} for number in range(2)]
    rows += [{"prompt": f"{QUESTION}{number}", "answer": "5", "other": 2} for number in range(9)]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    side = {"temperature": 0.7, "max_new_tokens": 60, "backend": "transformers"}
    return {
        "model": str(taught),
        "weak_model": str(taught / "early"),
        "output_dir": str(tmp_path / "pairs"),
        "data": {"path": str(file)},
        "held_out_prompts": 2,
        "chunk": 2,
        "chosen": side,
        "rejected": side,
        # The weak model says anything and never ends.
        "filters": {"check": "none"},
        **more,
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("ends")
def test_pairs_their_generation_and_a_card_are_written(taught: Path, tmp_path: Path) -> None:
    stage.run("tiny", overrides(keys(taught, tmp_path)))
    folder = tmp_path / "pairs"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert (len(rows), len(held_out)) == (8, 2), "eleven prompts, one of them twice, two apart"
    assert rows[0]["prompt"] == [{"role": "user", "content": QUESTION}]
    assert {row["prompt"][0]["content"] for row in held_out} == {f"{QUESTION}7", f"{QUESTION}8"}
    assert rows[0]["chosen"] == [{"role": "assistant", "content": ANSWER}]
    assert rows[0]["rejected"] != rows[0]["chosen"]
    made = rows[0]["generation"]
    assert made["chosen"]["weights_sha256"] == lineage.weights_sha256(taught)
    assert made["rejected"]["weights_sha256"] == lineage.weights_sha256(taught / "early")
    assert (made["rejected"]["temperature"], made["rejected"]["max_new_tokens"]) == (0.7, 60)
    card = (folder / "README.md").read_text()
    assert "| pairs.jsonl | 8 |" in card
    assert "10 prompts, 1 repetitions" in card
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.usefixtures("ends")
def test_a_killed_run_generates_only_what_is_missing_and_ends_with_the_same_pairs(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    stage.run("tiny", overrides(keys(taught, tmp_path, output_dir=str(whole))))
    written: list[str] = []
    write = files_module.write_whole

    def write_and_die(path: Path, content: str) -> None:
        write(path, content)
        written.append(path.name)
        if len(written) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers_module, "write_whole", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage.run("tiny", overrides(keys(taught, tmp_path)))
    assert not (tmp_path / "pairs").exists()
    stage.run("tiny", overrides(keys(taught, tmp_path)))
    assert sorted(written) == [f"{side}-{number:05d}.jsonl" for side in ("chosen", "rejected") for number in range(5)]
    for name in ("pairs.jsonl", "held_out.jsonl"):
        assert files(tmp_path / "pairs")[name] == files(whole)[name]


@pytest.mark.usefixtures("ends")
def test_shards_share_the_work_and_the_last_one_writes_what_one_process_would(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.run("tiny", overrides(keys(taught, tmp_path, output_dir=str(tmp_path / "whole"))))
    for shard in (1, 0):
        assert not (tmp_path / "pairs").exists()
        stage.run("tiny", overrides(keys(taught, tmp_path, shards=2, shard=shard)))
        said = capsys.readouterr().out
        assert ("shard 1 of 2 has all its answers" in said) == (shard == 1)
    assert files(tmp_path / "pairs")["pairs.jsonl"] == files(tmp_path / "whole")["pairs.jsonl"]


@pytest.mark.usefixtures("ends")
def test_other_settings_do_not_go_on_from_an_unfinished_run(taught: Path, tmp_path: Path) -> None:
    stage.run("tiny", overrides(keys(taught, tmp_path, shards=2, shard=0)))
    with pytest.raises(Mistake, match="unfinished work with other settings"):
        stage.run("tiny", overrides(keys(taught, tmp_path, shards=2, shard=1, seed=9)))


@pytest.mark.usefixtures("ends")
def test_no_pair_at_all_says_why_and_other_filters_go_on_from_the_answers(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageFailed, match=r"no prompt gave a pair \(10 chosen: length\); the answers are kept"):
        stage.run("tiny", overrides(keys(taught, tmp_path, filters={"min_tokens": 61})))
    assert not (tmp_path / "pairs").exists()
    monkeypatch.setattr(answers_module, "Generator", None)
    stage.run("tiny", overrides(keys(taught, tmp_path)))
    assert (tmp_path / "pairs" / "pairs.jsonl").is_file()
