from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_models import plain_logits, random_weights, small_recipe
from safetensors import safe_open
from safetensors.torch import load_file

from model.arithmetic import num_parameters
from model.hf_export import MARKER, check_export_target, export_checkpoint, export_tensors, verify_export
from model.hf_files import INDEX_FILE, SINGLE_FILE, SafetensorsWriter
from model.hf_folder import tokenizer_token_ids
from model.hf_mapping import hf_shapes
from model.model_card import ArithmeticFact, ModelCardFacts, StageFact, ValidationFact, facts_from_recipe, render_card
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml
from nanotron_recipes.schema.data import DataStage
from parallel.checkpoint import save_tensors

CLASSES = {
    "smollm3": {},
    "smollm3_untied_every_2nd": {"no_rope_layer": 2, "tie_word_embeddings": False},
    "llama": {"no_rope_layer": None},
    "qwen3": {"no_rope_layer": None, "use_qk_norm": True, "tie_word_embeddings": False},
}


def tokenizer_folder(folder: Path, vocabulary: int = 96) -> Path:
    folder.mkdir()
    tokens = [{"id": vocabulary - 1, "content": "<|pad|>"}, {"id": 0, "content": "<|endoftext|>"}]
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(1, vocabulary - 1)}}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": model}))
    names = {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": {"content": "<|pad|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "notes.txt").write_text("not a tokenizer file")
    return folder


@pytest.mark.parametrize("architecture", CLASSES.values(), ids=CLASSES)
def test_transformers_computes_the_logits_of_our_model(architecture: dict[str, Any], tmp_path: Path) -> None:
    recipe = small_recipe(padded_to=64, **architecture)
    weights = random_weights(recipe)
    report = export_tensors(weights.items(), recipe, tmp_path / "out", max_shard_bytes=50_000)
    assert len(report.weight_files) > 1
    token_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    difference = verify_export(tmp_path / "out", lambda ids: plain_logits(recipe, weights, ids), token_ids)
    assert difference < 1e-4


def test_verification_sees_a_swapped_gate_and_up(tmp_path: Path) -> None:
    recipe = small_recipe()
    weights = random_weights(recipe)
    name = "model.decoder.1.pp_block.mlp.gate_up_proj.weight"
    gate, up = weights[name].chunk(2)
    export_tensors((weights | {name: torch.cat((up, gate))}).items(), recipe, tmp_path / "out")
    token_ids = torch.arange(24)[None]
    assert verify_export(tmp_path / "out", lambda ids: plain_logits(recipe, weights, ids), token_ids) > 1e-2


def test_an_export_holds_everything_that_a_user_needs(tmp_path: Path) -> None:
    recipe = small_recipe(padded_to=64, dtype="bfloat16", bos_token_id=None)
    report = export_tensors(
        random_weights(recipe).items(),
        recipe,
        tmp_path / "out",
        tokenizer_dir=tokenizer_folder(tmp_path / "tok"),
        step=7,
    )
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        SINGLE_FILE,
        MARKER,
        "tokenizer.json",
        "tokenizer_config.json",
        "training_lineage.json",
    ]
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 0, 95)
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 95)
    assert (report.dtype, config["dtype"], report.hf_class) == ("bfloat16", "bfloat16", "SmolLM3ForCausalLM")
    assert report.weight_bytes == 2 * num_parameters(recipe) == 2 * report.num_parameters
    assert list(tmp_path.glob(".*")) == [], "nothing is left beside the folder"


def test_shards_are_the_format_of_safetensors_and_keep_every_bit(tmp_path: Path) -> None:
    recipe = small_recipe(dtype="bfloat16", tie_word_embeddings=False)
    weights = random_weights(recipe)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    export_tensors(weights.items(), recipe, whole)
    report = export_tensors(reversed(weights.items()), recipe, sharded, max_shard_bytes=10_000)
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == report.weight_bytes
    assert len(report.weight_files) > 2
    assert set(index["weight_map"]) == set(hf_shapes(recipe))
    expected = load_file(whole / SINGLE_FILE)
    for file in report.weight_files:
        assert (sharded / file).stat().st_size < 12_000
        with safe_open(sharded / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file
                assert torch.equal(shard.get_tensor(name), expected.pop(name))
    assert not expected


def test_a_tensor_that_never_comes_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = small_recipe()
    weights = random_weights(recipe)
    weights.popitem()
    with pytest.raises(ValueError, match="never came"):
        export_tensors(weights.items(), recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    recipe = small_recipe()
    (tmp_path / "out").mkdir()
    export_tensors(random_weights(recipe).items(), recipe, tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        export_tensors(random_weights(recipe).items(), recipe, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["notes.txt", ".git", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_an_export_with_a_file_of_the_users_is_refused_by_name_and_left_alone(name: str, tmp_path: Path) -> None:
    recipe, out = small_recipe(), tmp_path / "out"
    export_tensors(random_weights(recipe).items(), recipe, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"out: holds {re.escape(name)}, which this command did not write"):
            export_tensors(random_weights(recipe, seed=2).items(), recipe, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {name: b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="holds"):
        check_export_target(out)
    (out / name).unlink()
    check_export_target(out)
    export_tensors(random_weights(recipe, seed=2).items(), recipe, out)
    assert (out / SINGLE_FILE).read_bytes() != before[SINGLE_FILE]


def test_an_earlier_export_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    recipe, out = small_recipe(), tmp_path / "out"
    first, second = random_weights(recipe, seed=1), random_weights(recipe, seed=2)
    export_tensors(first.items(), recipe, out)
    before = (out / SINGLE_FILE).read_bytes()

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(second.items()))
        assert (out / SINGLE_FILE).read_bytes() == before
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        export_tensors(breaks_off(), recipe, out)
    assert (out / SINGLE_FILE).read_bytes() == before
    export_tensors(second.items(), recipe, out)
    assert (out / SINGLE_FILE).read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe()
    tokenizer = tokenizer_folder(tmp_path / "tok", vocabulary=100)
    with pytest.raises(UserError, match="vocab_size: 96"):
        export_tensors(random_weights(recipe).items(), recipe, tmp_path / "out", tokenizer_dir=tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        b'{"model": {"vocab": {"a": "x"}}}',
        b'{"model": {"vocab": [[["a"]]]}}',
        b'{"model": {"vocab": [3]}}',
        b'{"added_tokens": [{"id": 1}]}',
        b'{"added_tokens": [{"id": "x", "content": "y"}]}',
        b'{"added_tokens": [3]}',
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    recipe = small_recipe()
    tokenizer = tokenizer_folder(tmp_path / "tok")
    (tokenizer / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tok/tokenizer\.json: not "):
        export_tensors(random_weights(recipe).items(), recipe, tmp_path / "out", tokenizer_dir=tokenizer)


@pytest.mark.parametrize("content", ["3", "[]", "{}", '{"eos_token": ["x"]}', '{"eos_token": {"content": {}}}'])
def test_a_strange_configuration_of_a_tokenizer_names_no_tokens(content: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_folder(tmp_path / "tok")
    (tokenizer / "tokenizer_config.json").write_text(content)
    assert tokenizer_token_ids(tokenizer) == {}


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from model.hf_files import SafetensorsWriter
shapes = {f"t{i}": (4096, 1024) for i in range(24)}
torch.zeros(4096, 1024)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
writer = SafetensorsWriter(Path(sys.argv[1]), shapes, "float32", max_shard_bytes=200_000_000)
for name in shapes:
    writer.write(name, torch.full((4096, 1024), 1.5))
writer.close()
print(writer.total_bytes, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
"""


def test_writing_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    total, peak = map(int, run.stdout.split())
    assert total == 24 * 16 * 2**20
    assert peak < 4 * 16 * 2**20
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, {"a": (2, 2)}, "float32")
    with pytest.raises(ValueError, match="unknown"):
        writer.write("b", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="bfloat16"):
        writer.write("a", torch.zeros(2, 2, dtype=torch.bfloat16))
    writer.abandon()


@pytest.mark.parametrize(("name", "step"), [("best", 5), ("2024", 0)])
def test_the_step_of_an_export_is_the_checkpoints_own_whatever_its_folder_is_called(
    name: str, step: int, tmp_path: Path
) -> None:
    recipe, state = small_recipe(), {"step": step}
    save_tensors(tmp_path / name, random_weights(recipe).items(), state, {"recipe.yaml": dump_yaml(recipe)})
    export_checkpoint(tmp_path / name, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / MARKER).read_text())["step"] == (step or None)
    assert ("It has seen 5 of" in card, "which has not trained it" in card) == (step == 5, step == 0)
    assert "import" not in card.split("```")[0], "it may be the state that a run began with"


def test_sources_whose_folders_end_alike_have_shares_of_their_own() -> None:
    stage = {"name": "a", "start_training_step": 1, "data": {"dataset": {}}}
    stage["data"]["dataset"] = {  # type: ignore[index]
        "dataset_folder": ["/data/english/tokens", "/data/french/tokens/", "/data/code"],
        "dataset_weights": [0.6, 0.3, 0.1],
    }
    recipe = small_recipe()
    recipe = recipe.model_copy(update={"data_stages": [DataStage.model_validate(stage)]})
    (fact,) = facts_from_recipe(recipe, name="small", step=1).stages
    assert fact.weights == pytest.approx({"english/tokens": 0.6, "french/tokens": 0.3, "code": 0.1})


def test_the_model_card_tells_what_is_known() -> None:
    facts = ModelCardFacts(
        name="tiny-1",
        hf_class="SmolLM3ForCausalLM",
        num_parameters=361_280,
        shape={"layers": "6"},
        recipe="tiny",
        step=1100,
        train_steps=1100,
        tokens=3_379_200,
        stages=(StageFact("stable", 1, {"prose": 0.5, "code": 0.25, "arithmetic": 0.25}),),
        validation=(ValidationFact("prose", 3.7, 2.19, 2.54), ValidationFact("other", 3.0)),
        arithmetic=ArithmeticFact(390, 400),
    )
    card = render_card(facts)
    front_matter, text = card.split("---\n")[1:3]
    assert "license" not in yaml.safe_load(front_matter), "what the weights may be used for depends on their text"
    for line in (
        "| stable | 1 | prose 50 %, code 25 %, arithmetic 25 % |",
        "| prose | 3.700 | 2.190 | 2.540 |",
        "| other | 3.000 | – | – |",
        "(97.5 %) are answered correctly, greedily",
        "of 361,280 parameters",
        "1,100 of 1,100 steps, 3,379,200 tokens.",
    ):
        assert line in text


def test_a_model_card_leaves_out_what_is_unknown() -> None:
    card = render_card(facts_from_recipe(small_recipe(), name="small"))
    assert "# small" in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nanotron-recipes"],
    }
    assert "| layers without rotary positions | 1 (layer 4) |" in card
    assert not any(
        word in card for word in ("Validation", "Arithmetic", "Training data", "steps", "None", "pretrained with")
    )
