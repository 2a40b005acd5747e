"""The prompt of a pair: preference training reads the tokens that both models answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import overrides
from test_mistakes import error_of
from test_pairs import keys
from trl import DPOConfig

from posttraining import generation, prefer
from posttraining.datasets import load_data, load_held_out
from posttraining.pairs import stage
from posttraining.prefer import PreferSettings
from posttraining.settings import load


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("template", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
def test_training_reads_the_prompts_that_were_answered(
    template: dict[str, Any], taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: set[tuple[int, ...]] = set()
    encode = generation._ids

    def noted(*arguments: Any) -> list[int]:
        ids = encode(*arguments)
        answered.add(tuple(ids))
        return ids

    monkeypatch.setattr(generation, "_ids", noted)
    words = keys(taught, tmp_path)
    side = {**words["chosen"], "max_new_tokens": 8, "template": template}
    stage.run("tiny", overrides({**words, "chosen": side, "rejected": side}))
    folder = tmp_path / "pairs"
    data = {"path": str(folder / "pairs.jsonl"), "held_out_path": str(folder / "held_out.jsonl")}
    prefers = overrides({"model": str(taught), "output_dir": str(tmp_path / "out"), "data": data})
    (settings, arguments), _ = load("tiny", "prefer", (PreferSettings, DPOConfig), prefers)
    rows, held_out = load_data(settings.data, "pairs"), load_held_out(settings.data, "pairs")
    trainer, tokenizer = prefer.make_trainer(settings, arguments, rows, held_out)
    read = [tuple(row["prompt_ids"]) for part in (trainer.train_dataset, trainer.eval_dataset) for row in part]
    assert set(read) == answered and len(read) == 10
    thoughtless = tokenizer.decode(read[0]).endswith("<think>\n\n</think>\n")
    assert thoughtless == (template.get("enable_thinking") is False)


def test_two_templates_for_one_prompt_are_refused(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = keys(taught, tmp_path, chosen={"template": {"enable_thinking": False}})
    error = error_of("pairs", words, capsys)
    assert "rejected.template: {}: expected that of chosen, {'enable_thinking': False}: a pair has one prompt" in error
