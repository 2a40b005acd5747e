"""The model card: what each stage started from, and a usage example that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_chat

from posttraining import lineage, merge
from posttraining.card import card, write_card


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model after SFT, and one that GRPO is said to have made of it."""
    folder = tmp_path_factory.mktemp("parents")
    sft, grpo = write_chat(folder / "sft", seed=1), write_chat(folder / "grpo", seed=2)
    (grpo / lineage.FILE).unlink()
    lineage.append(grpo, sft, "grpo", {"beta": 0.0}, None)
    return sft, grpo


def merged(parents: tuple[Path, Path], folder: Path, method: str) -> Path:
    shares = (", weight: 0.1", ", weight: 0.9") if method == "linear" else ("", "")
    models = ", ".join(f"{{model: {model}{share}}}" for model, share in zip(parents, shares, strict=True))
    merge.run("tiny", [f"models=[{models}]", f"method={method}", f"output_dir={folder / 'mix'}"])
    return folder / "mix"


def test_a_merge_is_shown_with_its_parents_and_their_shares(parents: tuple[Path, Path], tmp_path: Path) -> None:
    text = card(merged(parents, tmp_path, "linear"), "")
    assert "| merge | 0.1 sft + 0.9 grpo | method linear |" in text
    assert "| grpo | sft | beta 0.0 |" in text and "| pretrain | – |" in text


def test_a_soup_has_equal_shares(parents: tuple[Path, Path], tmp_path: Path) -> None:
    assert "| merge | 0.5 sft + 0.5 grpo | method soup |" in card(merged(parents, tmp_path, "soup"), "")


def test_the_example_of_the_card_runs_in_its_folder(parents: tuple[Path, Path], tmp_path: Path) -> None:
    folder = merged(parents, tmp_path, "soup")
    write_card(folder, "")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    words = [sys.executable, "-c", code.replace("256", "2")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
