"""The lineage that an export starts, and that post-training reads it as it was written."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hf_models import random_weights, small_recipe

from data import arithmetic
from model.hf_export import export_tensors
from model.lineage import LINEAGE_FILE, weights_sha256

POSTTRAINING = Path(__file__).resolve().parents[2] / "posttraining" / "src"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    recipe = small_recipe()
    weights = random_weights(recipe).items()
    export_tensors(weights, recipe, tmp_path / "out", data_fingerprint="f" * 64, max_shard_bytes=50_000)
    return tmp_path / "out"


def test_the_hash_of_the_weights_is_that_of_what_sha256sum_prints(export: Path) -> None:
    assert len(list(export.glob("*.safetensors"))) > 1
    printed = subprocess.run("sha256sum *.safetensors", shell=True, cwd=export, capture_output=True, check=True).stdout
    assert weights_sha256(export) == hashlib.sha256(printed).hexdigest()


def test_an_export_starts_a_lineage_with_its_recipe_its_data_and_its_weights(export: Path) -> None:
    content = json.loads((export / LINEAGE_FILE).read_text())
    (stage,) = content["stages"]
    assert (content["format"], stage["stage"], stage["parent"]) == (1, "pretrain", None)
    assert stage["config"]["model"]["model_config"]["hidden_size"] == small_recipe().model.architecture.hidden_size
    assert stage["data_fingerprint"] == "f" * 64
    assert stage["weights_sha256"] == weights_sha256(export)
    assert {"nanotron-recipes", "torch"} <= set(stage["versions"])


def test_post_training_reads_the_lineage_and_sees_other_weights(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(POSTTRAINING))
    from posttraining import lineage

    assert lineage.stage_names(export) == ["pretrain"]
    assert lineage.matches_weights(export)
    file = next(export.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert not lineage.matches_weights(export)


def test_post_training_holds_out_what_pretraining_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(POSTTRAINING))
    from posttraining.tasks import arithmetic as task

    numbers = range(arithmetic.SMALLEST, arithmetic.LARGEST + 1)
    operations = [(a, sign, b) for a in numbers for b in numbers for sign in "+-"]
    ours = [arithmetic.is_held_out(*operation) for operation in operations]
    assert [task.is_held_out(*operation) for operation in operations] == ours
    assert 0.08 < sum(ours) / len(ours) < 0.12
