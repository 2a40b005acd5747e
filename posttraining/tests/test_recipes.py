"""The ported SmolLM3 recipes run: two steps each, on a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_rows, overrides, write_rows
from test_prefer import pairs

from posttraining import lineage, prefer, sft
from posttraining.settings import RECIPES

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "max_length": 128,
    # What a CPU has not.
    "use_cpu": True,
    "bf16": False,
    "model_init_kwargs": {},
    "dataset_num_proc": None,
    "gradient_accumulation_steps": 1,
    "report_to": "none",
}


def recipe(name: str) -> str:
    return str(RECIPES / "smollm3" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["mid", "sft", "sft-baseline"])
def test_the_recipes_of_supervised_stages_run(name: str, base: Path, tmp_path: Path) -> None:
    sources = []
    for number, weight in enumerate((1.0, 0.5)):
        rows = [{**row, "chat_template_kwargs": {"enable_thinking": bool(number)}} for row in chat_rows(8)]
        sources.append({"path": str(write_rows(tmp_path / f"{number}.jsonl", rows)), "weight": weight})
    keys = {**SMALL, "model": str(base), "output_dir": str(tmp_path / "out"), "data": {"sources": sources}}
    sft.run(recipe(name), overrides(keys))
    assert lineage.stage_names(tmp_path / "out")[-1] == ("mid" if name == "mid" else "sft")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert all(record["loss"] > 0 for record in records if "loss" in record)


def test_the_recipe_of_preferences_runs(taught: Path, tmp_path: Path) -> None:
    sources = [{"path": str(write_rows(tmp_path / "pairs.jsonl", pairs(8))), "weight": 0.5}]
    keys = {**SMALL, "model": str(taught), "output_dir": str(tmp_path / "out"), "data": {"sources": sources}}
    prefer.run(recipe("prefer"), overrides(keys))
    assert lineage.stage_names(tmp_path / "out") == ["pretrain", "sft", "prefer"]
