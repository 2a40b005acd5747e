"""Pairs in every form: what is text becomes turns, the prompt is found where answers repeat it, the rest is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ANSWER, QUESTION, write_rows
from test_mistakes import error_of
from test_prefer import pairs, trainer_for, words
from tiny_model import write_chat

from posttraining import prefer
from posttraining.model_folder import load_tokenizer

USER = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TURNS: dict[str, Any] = {"prompt": [USER], "chosen": reply("It is 5."), "rejected": reply("No, 6.")}
WHOLE: dict[str, Any] = {"chosen": [USER, *reply("It is 5.")], "rejected": [USER, *reply("No, 6.")]}
FORMS: dict[str, list[dict[str, Any]]] = {
    "text": [{"prompt": QUESTION, "chosen": "It is 5.", "rejected": "No, 6."}],
    "a prompt as turns, answers as text": [{**TURNS, "chosen": "It is 5.", "rejected": "No, 6."}],
    "a prompt as text, answers as turns": [{**TURNS, "prompt": QUESTION}],
    "a prompt as text that whole conversations repeat": [{**WHOLE, "prompt": QUESTION}],
    "no prompt": [WHOLE],
    "a prompt in some rows": [TURNS, {**WHOLE, "prompt": None}, {**WHOLE, "prompt": QUESTION}],
    "forms of both kinds": [
        {"prompt": QUESTION, "chosen": "It is 5.", "rejected": "No, 6."},
        {**WHOLE, "prompt": None},
        TURNS,
    ],
}


ENDS = {
    "nothing after the end of a turn": ("<|im_end|>", "It is 5.<|im_end|>"),
    "no end of a turn": ("\n\n", "It is 5.\n\n"),
    "words after the end of a turn": ("<|im_end|>\nNext:\n", "It is 5.<|im_end|>\nNext:\n"),
}


def read_by_the_trainer(chat: Path, folder: Path, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    file = str(write_rows(folder / "forms.jsonl", rows))
    trainer = trainer_for(chat, folder, data={"path": file, "held_out_path": file})
    for part in (trainer.train_dataset, trainer.eval_dataset):
        ids = [[row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in part]
    return ids


@pytest.mark.parametrize("mode", [{}, {"chat_template_kwargs": {"enable_thinking": False}}], ids=["think", "no_think"])
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_every_form_is_trained_as_the_same_conversation(
    rows: list[dict[str, Any]], mode: dict[str, Any], chat: Path, tmp_path: Path
) -> None:
    (expected,) = read_by_the_trainer(chat, tmp_path, [{**TURNS, **mode}])
    assert read_by_the_trainer(chat, tmp_path, [{**row, **mode} for row in rows]) == [expected] * len(rows)
    shown = [load_tokenizer(chat).decode(ids) for ids in expected]
    assert shown[1:] == ["It is 5.<|im_end|>", "No, 6.<|im_end|>"]
    assert shown[0].endswith("assistant\n<think>\n\n</think>\n" if mode else "assistant\n")


@pytest.mark.parametrize("think", [True, False])
def test_an_answer_of_several_turns_ends_with_the_end_of_the_last(think: bool, chat: Path, tmp_path: Path) -> None:
    first, again = reply("<think>\nAdd.\n</think>\nIt is 5."), [{"role": "user", "content": "Sure?"}]
    row = {
        "chat_template_kwargs": {"enable_thinking": think},
        "chosen": [SYSTEM, USER, *first, *again, *reply("Yes.")],
        "rejected": [SYSTEM, USER, *reply("No, 6."), *again, *reply("No."), *again, *reply("")],
    }
    (ids,) = read_by_the_trainer(chat, tmp_path, [row])
    tokenizer = load_tokenizer(chat)
    thought, empty = ("<think>\nAdd.\n</think>\n", "") if think else ("", "<think>\n\n</think>\n")
    turn = f"<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n{empty}"
    assert tokenizer.decode(ids[1]) == f"{thought}It is 5.{turn}Yes.<|im_end|>"
    assert tokenizer.decode(ids[2]) == f"No, 6.{turn}No.{turn}<|im_end|>"


@pytest.mark.parametrize(("ending", "said"), ENDS.values(), ids=ENDS)
def test_other_templates_end_an_answer_where_they_do(ending: str, said: str, chat: Path, tmp_path: Path) -> None:
    other = shutil.copytree(chat, tmp_path / "other")
    turn = f"{{%- for m in messages -%}}{{{{- m.role + ': ' + m.content + {ending!r} -}}}}{{%- endfor -%}}"
    (other / "chat_template.jinja").write_text(
        turn + "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    )
    (ids,) = read_by_the_trainer(other, tmp_path, [TURNS])
    assert load_tokenizer(other).decode(ids[1]) == said


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Q: 2+3? A: 5", "rejected": "Q: 2+3? A: 6"},
        {"prompt": "", "chosen": "It is 5.", "rejected": "No, 6."},
        {"prompt": [], "chosen": reply("It is 5."), "rejected": reply("No, 6.")},
        {"chosen": [USER, *reply("It is 5.")], "rejected": [{**USER, "content": "2+4?"}, *reply("No, 6.")]},
        {
            "chosen": [SYSTEM, USER, *reply("It is 5.")],
            "rejected": [SYSTEM, {**USER, "content": "2+4?"}, *reply("No, 6.")],
        },
        {"prompt": QUESTION, "chosen": [USER, *reply("It is 5.")], "rejected": reply("No, 6.")},
    ],
)
@pytest.mark.parametrize("command", ["prefer", "compare"])
def test_pairs_without_a_prompt_in_common_are_one_line(
    command: str, row: dict[str, Any], chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", [{**WHOLE, "prompt": None}, {"prompt": None, **row}]))
    keys: dict[str, Any] = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": file}}
    keys |= {"eval_strategy": "no", "eval_on_start": False}
    said = (
        "data.path: row 1: expected a prompt, or chosen and rejected as messages that begin with the same user's turn"
    )
    assert said in error_of(command, keys, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ahead", [True, False])
def test_pairs_whose_prompts_fill_the_length_are_counted_and_not_all_may_be(
    ahead: bool, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**TURNS, "prompt": [{**USER, "content": QUESTION * 60}]}
    whole = {"eval_strategy": "no", "eval_on_start": False, "precompute_ref_log_probs": ahead, "max_length": 100}
    files = [str(write_rows(tmp_path / name, rows)) for name, rows in (("a", [long]), ("b", [long, *pairs(3)]))]
    for path in files:
        Path(path).rename(f"{path}.jsonl")
    data = {"path": f"{files[1]}.jsonl", "held_out_path": f"{files[1]}.jsonl"}
    prefer.run("tiny", words(chat, tmp_path, **{**whole, "data": data, "max_steps": 1}))
    out = capsys.readouterr().out
    for key in ("data", "data.held_out_path"):
        said = (
            f"prefer: note: {key}: 1 of 4 pairs are left out: prompts that alone have max_length 100 tokens or more\n"
        )
        assert said in out
    for key, name in (("data", "path"), ("data.held_out_path", "held_out_path")):
        keys = {"model": str(chat), "output_dir": str(tmp_path / "other"), **whole}
        error = error_of("prefer", {**keys, "data": {**data, name: f"{files[0]}.jsonl"}}, capsys)
        assert f"chat: {key}: has only prompts that alone have max_length 100 tokens or more" in error


@pytest.mark.parametrize("loss", ["apo_zero", "sigmoid", "apo_down"])
def test_pairs_of_equal_answers_are_counted_and_of_most_losses_nothing_is_learnt_from_them(
    loss: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    equal, text = {**TURNS, "rejected": TURNS["chosen"]}, {"prompt": QUESTION, "chosen": "Five.", "rejected": "Five."}
    path = str(write_rows(tmp_path / "equal.jsonl", [equal, TURNS, {**WHOLE, "prompt": None}, text]))
    trainer = trainer_for(chat, tmp_path, loss_type=[loss], data={"path": path, "held_out_path": path})
    said, out = "chosen and rejected are equal in 2 of 4 pairs:", capsys.readouterr().out
    learnt = "no preference" if loss == "apo_down" else "nothing"
    assert f"prefer: note: data: {said} {learnt} is learnt from them\n" in out
    assert f"prefer: note: data.held_out_path: {said} their margin is always 0\n" in out
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 4, "they are kept"
    gradients = []
    for numbers in ((0, 3), (1, 2)):
        batch = trainer.data_collator([trainer.train_dataset[number] for number in numbers])
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(max(weights.grad.abs().max().item() for weights in trainer.model.parameters()))
    assert gradients[1] > 1e-3
    assert (gradients[0] < 1e-6) == (loss != "apo_down")


def test_pairs_that_all_differ_are_not_spoken_of(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(chat, tmp_path)
    assert "equal" not in capsys.readouterr().out


def test_an_answer_that_equals_the_other_does_not_become_the_prompt(chat: Path, tmp_path: Path) -> None:
    equal = {"chosen": [USER, *reply(ANSWER)], "rejected": [USER, *reply(ANSWER)]}
    (prompt, chosen, rejected), _ = read_by_the_trainer(chat, tmp_path, [equal, WHOLE])
    assert prompt and chosen == rejected and len(chosen) > 5
