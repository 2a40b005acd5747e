"""Losses on the same pairs: one csv of every value, one plot, and no run twice."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from conftest import overrides, write_rows
from test_prefer import pairs

from posttraining import compare, prefer
from posttraining.errors import Mistake


def words(taught: Path, tmp_path: Path, **more: object) -> list[str]:
    keys = {
        "model": str(taught),
        "output_dir": str(tmp_path / "out"),
        "data": {
            "path": str(write_rows(tmp_path / "pairs.jsonl", pairs(8))),
            "held_out_path": str(write_rows(tmp_path / "held_out.jsonl", pairs(12)[8:])),
        },
        "runs": {"zero": {"loss_type": ["apo_zero"]}, "dpo": {"loss_type": ["sigmoid"], "beta": 0.2}},
        "seeds": [1, 2],
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    return overrides({**keys, **more})


def test_every_value_of_every_run_and_seed_is_in_one_csv(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = prefer.train

    def counted(mapping: dict[str, str], *arguments: object) -> bool:
        trained.append(Path(mapping["output_dir"]).name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(mapping, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prefer, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.run("tiny", words(taught, tmp_path))
    assert not (tmp_path / "out").exists()
    compare.run("tiny", words(taught, tmp_path))
    assert trained == ["zero-1", "zero-2", "dpo-1", "dpo-1", "dpo-2"], "what was done is not done again"

    with (tmp_path / "out" / compare.CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == compare.COLUMNS
    found = {(row["run_name"], row["seed"]) for row in rows}
    assert found == {("zero", "1"), ("zero", "2"), ("dpo", "1"), ("dpo", "2")}
    losses = {row["run_name"]: float(row["value"]) for row in rows if (row["metric"], row["step"]) == ("loss", "1")}
    assert losses == pytest.approx({"zero": 1.0, "dpo": 0.6931}, abs=1e-3), "policy and reference are the same at first"
    gains = [row for row in rows if row["metric"] == "held_out_margin_gain"]
    assert len(gains) == 4
    assert (tmp_path / "out" / compare.PLOT).stat().st_size > 5000
    assert list((tmp_path / "out").glob("*/*.safetensors")) == [], "weights are not kept unless asked for"


def test_null_leaves_a_run_of_the_recipe_out(taught: Path, tmp_path: Path) -> None:
    keys = words(taught, tmp_path, seeds=[1], num_train_epochs=0.5)
    compare.run("tiny", [*keys, "runs.dpo=null"])
    with (tmp_path / "out" / compare.CSV).open() as file:
        assert {row["run_name"] for row in csv.DictReader(file)} == {"zero"}


def test_a_typo_in_a_run_is_found_before_anything_is_trained(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"runs\.dpo: los_type: unknown key; did you mean loss_type\?"):
        compare.run("tiny", words(taught, tmp_path, runs={"dpo": {"los_type": ["sigmoid"]}}))
    with pytest.raises(Mistake, match="seeds: is empty"):
        compare.run("tiny", words(taught, tmp_path, seeds=[]))
    with pytest.raises(Mistake, match=r"runs\.dpo: 3: expected a section or null"):
        compare.run("tiny", words(taught, tmp_path, runs={"dpo": 3}))
    with pytest.raises(Mistake, match="runs: is empty"):
        compare.run("tiny", words(taught, tmp_path, runs={"dpo": None}))
    assert list(tmp_path.glob(".*")) == []
