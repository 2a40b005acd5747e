"""Preference losses against their formulas, reference log-probabilities computed ahead, margins, the guard's record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWER, QUESTION, overrides, write_rows
from tiny_model import write_base
from trl import DPOConfig

from posttraining import lineage, prefer
from posttraining.chat import prepare_tokenizer
from posttraining.datasets import load_data, load_held_out
from posttraining.errors import Mistake
from posttraining.generation import generate
from posttraining.model_folder import load_model, load_tokenizer, save_model
from posttraining.prefer import MARGINS, PreferSettings
from posttraining.settings import load

BETA = 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS: dict[str, Callable[[float, float], float]] = {
    # D'Oosterlinck et al. 2024, section 3, and Rafailov et al. 2023, equation 7; c, r: log-ratios to the reference.
    "apo_zero": lambda c, r: (1 - sigmoid(BETA * c)) + sigmoid(BETA * r),
    "apo_down": lambda c, r: sigmoid(BETA * c) + (1 - sigmoid(BETA * (c - r))),
    "sigmoid": lambda c, r: -math.log(sigmoid(BETA * (c - r))),
}


def pairs(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"{QUESTION}{number}"}]}
        row["chosen"] = [{"role": "assistant", "content": ANSWER}]
        row["rejected"] = [{"role": "assistant", "content": f"No {number * number}."}]
        rows.append(row)
    return rows


def words(model: Path, tmp_path: Path, **more: Any) -> list[str]:
    data = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs(12)))}
    data["held_out_path"] = str(write_rows(tmp_path / "held_out.jsonl", pairs(20)[12:]))
    keys = {
        "model": str(model),
        "output_dir": str(tmp_path / "out"),
        "data": data,
        "beta": BETA,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return overrides({**keys, **more})


def trainer_for(model: Path, tmp_path: Path, **more: Any) -> Any:
    (settings, arguments), _ = load("tiny", "prefer", (PreferSettings, DPOConfig), words(model, tmp_path, **more))
    data, held_out = load_data(settings.data, "pairs"), load_held_out(settings.data, "pairs")
    return prefer.make_trainer(settings, arguments, data, held_out)[0]


def log_probability(model: Any, tokenizer: Any, row: dict[str, Any], side: str) -> float:
    """log p(answer | prompt), summed over the tokens of the answer to the end of its turn, from the logits."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    both = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([both])).logits[0].double().log_softmax(-1)
    end = both.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), len(prompt))
    assert tokenizer.decode(both[end + 1 :]) == "\n", "what nothing has taught"
    return sum(logits[place - 1, both[place]].item() for place in range(len(prompt), end + 1))


@pytest.mark.parametrize("loss", FORMULAS)
@pytest.mark.parametrize("precomputed", [True, False])
def test_the_loss_of_the_trainer_is_the_formula(loss: str, precomputed: bool, taught: Path, tmp_path: Path) -> None:
    trainer = trainer_for(taught, tmp_path, loss_type=[loss], precompute_ref_log_probs=precomputed)
    torch.manual_seed(0)
    with torch.no_grad():  # away from the reference, where every loss is a constant
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch).item()
    reference, tokenizer = load_model(taught), load_tokenizer(taught)
    expected, ratios = [], []
    for row in pairs(4):
        c, r = (
            log_probability(trainer.model, tokenizer, row, side) - log_probability(reference, tokenizer, row, side)
            for side in ("chosen", "rejected")
        )
        ratios.append(abs(c - r))
        expected.append(FORMULAS[loss](c, r))
    assert max(ratios) > 0.1, "the policy is not the reference"
    assert found == pytest.approx(sum(expected) / len(expected), abs=2e-6, rel=1e-6)


def test_reference_log_probabilities_computed_ahead_train_the_same_model(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for ahead in (True, False):
        folder = tmp_path / str(ahead)
        folder.mkdir()
        prefer.run(
            "tiny", words(taught, folder, precompute_ref_log_probs=ahead, eval_strategy="no", eval_on_start=False)
        )
        note = "note: no margins of the held-out pairs, which need precompute_ref_log_probs: true"
        assert ((folder / "out" / MARGINS).is_file(), note in capsys.readouterr().out) == (ahead, not ahead)
        lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_raises_the_margin_of_held_out_pairs_and_says_by_how_much(taught: Path, tmp_path: Path) -> None:
    prefer.run("tiny", words(taught, tmp_path, num_train_epochs=3))
    margins = json.loads((tmp_path / "out" / MARGINS).read_text())
    before, after = load_model(taught), load_model(tmp_path / "out")
    tokenizer = load_tokenizer(taught)
    for name, model in (("before", before), ("after", after)):
        by_hand = [
            log_probability(model, tokenizer, row, "chosen") - log_probability(model, tokenizer, row, "rejected")
            for row in pairs(20)[12:]
        ]
        assert margins[name]["mean"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-3)
    assert margins["pairs"] == 8
    assert margins["gain"]["mean"] > 3 * margins["gain"]["error"]
    assert lineage.stage_names(tmp_path / "out") == ["pretrain", "sft", "prefer"]
    turns = [{"role": "user", "content": QUESTION}]
    (answer,) = generate(after, tokenizer, [turns], max_new_tokens=60, temperature=0, seed=0)
    assert (answer.text, answer.stopped) == (ANSWER, True)


def test_margins_of_short_answers_are_those_of_their_tokens_to_the_end_of_the_turn(
    taught: Path, tmp_path: Path
) -> None:
    rows = [{**row, "chosen": [{"role": "assistant", "content": "5"}]} for row in pairs(4)]
    for number, row in enumerate(rows):
        row["rejected"] = [{"role": "assistant", "content": "67"[: number % 3]}]
    file = str(write_rows(tmp_path / "short.jsonl", rows))
    trainer = trainer_for(taught, tmp_path, data={"path": file, "held_out_path": file})
    model, tokenizer = load_model(taught), load_tokenizer(taught)
    found = trainer.eval_dataset
    for side in ("chosen", "rejected"):
        expected = [log_probability(model, tokenizer, row, side) for row in rows]
        assert list(found[f"ref_{side}_logps"]) == pytest.approx(expected, abs=1e-4)
    by_hand = [
        log_probability(model, tokenizer, row, "chosen") - log_probability(model, tokenizer, row, "rejected")
        for row in rows
    ]
    measured = prefer.margins(trainer)
    for name in ("before", "after"):
        assert measured[name]["mean"] == pytest.approx(sum(by_hand) / 4, abs=1e-4)


def test_a_reason_lets_a_model_without_sft_pass_and_is_recorded(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    tokenizer, model = load_tokenizer(base), load_model(base)
    prepare_tokenizer(tokenizer, model)
    save_model(model, tokenizer, base)
    (base / lineage.FILE).unlink()
    prefer.run("tiny", words(base, tmp_path, max_steps=1), force="taken from elsewhere")
    stages = lineage.read(tmp_path / "out")
    assert stages is not None
    assert stages[-1]["forced"] == "taken from elsewhere"


def test_prompts_as_text_beside_whole_conversations_are_read(taught: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": row["prompt"][0]["content"],
            **{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")},
        }
        for row in pairs(4)
    ]
    file = write_rows(tmp_path / "whole.jsonl", rows)
    trainer = trainer_for(taught, tmp_path)
    expected = [trainer.train_dataset[number] for number in range(4)]
    other = trainer_for(taught, tmp_path, data={"path": str(file), "held_out_path": str(file)})
    for number in range(4):
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert other.train_dataset[number][key] == expected[number][key]


def test_evaluation_without_held_out_pairs_is_a_mistake(taught: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "only.jsonl", pairs(4))
    with pytest.raises(Mistake, match="eval_strategy: 'steps': there are no rows to evaluate on"):
        prefer.run("tiny", words(taught, tmp_path, data={"path": str(file)}))
