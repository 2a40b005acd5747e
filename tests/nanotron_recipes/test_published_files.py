"""The five configuration files that Hugging Face published for SmolLM3 are recipes as they are."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanotron_recipes.errors import UserError
from nanotron_recipes.fields import all_keys
from nanotron_recipes.loading import LoadedRecipe, dump_yaml, load_recipe, recipe_from_mapping
from nanotron_recipes.parameters import parameter_names
from nanotron_recipes.topology import resolve_topology
from nanotron_recipes.unsupported import unsupported_features
from nanotron_recipes.yaml_text import parse_yaml

FOLDER = Path(__file__).parent / "fixtures"
NAMES = ["stage1", "stage2", "stage3", "long_32k", "long_64k"]


def path_of(name: str) -> Path:
    return FOLDER / f"smollm3-{name}.yaml"


def load(name: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(str(path_of(name)), overrides)


def keys_in(value: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a raw file, sections included, with [] for the entries of a list."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield f"{prefix}{name}"
            yield from keys_in(below, f"{prefix}{name}.")
    elif isinstance(value, list):
        for entry in value:
            yield from keys_in(entry, f"{prefix.removesuffix('.')}[].")


NANOTRONS = ("data_stages[].sequence_length", "lighteval.tasks", "model.init_method.scaling_method", "profiler.")
"""Keys of nanotron's own, and sections of such, that no published file has."""


def test_the_table_of_keys_that_are_not_nanotrons_is_whole() -> None:
    published = {key for name in NAMES for key in keys_in(parse_yaml(path_of(name).read_text(), name))}
    added: list[str] = []
    for path, key in all_keys():
        is_below = path.startswith(tuple(f"{section}{end}" for section in added for end in (".", "[].")))
        if path not in published and not key.no_effect and not path.startswith(NANOTRONS) and not is_below:
            added.append(path)
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    named: list[str] = []
    for row in re.findall(r"^\| (`.*?) \|", page.partition("## Keys that are not nanotron's")[2], flags=re.MULTILINE):
        section = ""
        for key in re.findall(r"`([^`]+)`", row):
            section = f"{key.rpartition('.')[0]}." if "." in key else section
            named.append(key if "." in key else f"{section}{key}")
    whole = [key for key in named if ": auto" not in key]  # values, of keys that nanotron has
    assert sorted(whole) == sorted(added)


def test_all_five_are_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("smollm3-*.yaml")) == sorted(f"smollm3-{name}" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_validates_and_its_values_arrive(name: str) -> None:
    recipe = load(name).recipe
    raw = parse_yaml(path_of(name).read_text(), name)
    assert recipe.model.architecture.rope_theta == raw["model"]["model_config"]["rope_theta"]
    assert recipe.model.architecture.use_doc_masking
    assert (
        recipe.optimizer.learning_rate_scheduler.learning_rate
        == raw["optimizer"]["learning_rate_scheduler"]["learning_rate"]
    )
    assert [stage.data.dataset.dataset_weights for stage in recipe.data_stages] == [
        stage["data"]["dataset"]["dataset_weights"] for stage in raw["data_stages"]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_used_or_noted(name: str) -> None:
    loaded = load(name)
    schema = dict(all_keys())
    noted = {note.split(": no effect: ")[0] for note in loaded.notes if ": no effect: " in note}
    raw = parse_yaml(path_of(name).read_text(), name)
    for key in keys_in(raw):
        around = [key[:end] for end in range(1, len(key) + 1) if end == len(key) or key[end] in ".["]
        if not noted.intersection(around):
            assert key in schema and schema[key].no_effect is None, key


def test_the_keys_without_effect_are_the_expected_ones() -> None:
    noted = {note.split(": no effect: ")[0] for note in load("stage1").notes}
    assert {"general.run", "s3_upload.s5cmd_path", "metrics_logging", "tokenizer.tokenizer_max_length"} <= noted
    assert {"lighteval.wandb_project", "lighteval.output_dir", "lighteval.eval_interval_file"} <= noted
    assert not {"lighteval", "lighteval.eval_interval", "lighteval.batch_size", "lighteval.slurm"} & noted
    assert not {"s3_upload", "s3_upload.upload_s3_path", "s3_upload.remove_after_upload"} & noted
    assert not any(key.startswith("optimizer") for key in noted)


@pytest.mark.parametrize(("name", "batch", "ranks"), [("stage1", 576, 384), ("long_32k", 72, 96), ("long_64k", 36, 96)])
def test_the_batch_follows_from_the_files_own_dp(name: str, batch: int, ranks: int) -> None:
    topology = resolve_topology(load(name).recipe)
    assert (topology.global_batch_size, topology.world_size) == (batch, ranks)


def test_another_dp_keeps_the_batch_of_the_file() -> None:
    loaded = load("stage1", "parallelism.dp=4")
    topology = resolve_topology(loaded.recipe)
    assert (topology.global_batch_size, topology.num_micro_batches) == (576, 48)
    assert any(note.startswith("tokens.global_batch_size: 576") for note in loaded.notes)


def test_weights_that_do_not_sum_to_one_are_noted() -> None:
    assert any("data_stages.2" in note and "1.00565" in note for note in load("stage3").notes)
    assert not any("dataset_weights" in note for note in load("stage1").notes)


def test_what_cannot_be_trained_yet_is_noted_first_and_named_for_pretrain() -> None:
    loaded = load("long_64k")
    assert loaded.recipe.parallelism.recompute == "full"
    features = unsupported_features(loaded.recipe)
    keys = {line.split(": ")[0] for line in features}
    assert keys == {"parallelism.context_parallel_size"}
    assert loaded.notes[: len(features)] == features
    neutral = ["parallelism.context_parallel_size=1"]
    assert unsupported_features(load("long_64k", *neutral).recipe) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_file_reads_back_equal(name: str) -> None:
    recipe = load(name).recipe
    assert recipe_from_mapping(parse_yaml(dump_yaml(recipe), name)).recipe == recipe


def test_the_shipped_recipe_is_the_published_model_and_optimizer() -> None:
    ours, published = load_recipe("smollm3-3b").recipe, load("stage1").recipe
    assert ours.model == published.model.model_copy(update={"architecture": ours.model.architecture})
    inert = {key.attribute for path, key in all_keys() if path.startswith("model.model_config.") and key.no_effect}
    assert ours.model.architecture.model_dump(exclude=inert) == published.model.architecture.model_dump(exclude=inert)
    assert ours.optimizer == published.optimizer
    assert resolve_topology(ours, 384) == resolve_topology(published, 384)
    assert len(parameter_names(ours)) == 1 + 36 * 6 + 1


def test_the_shipped_recipe_reads_the_published_mixtures() -> None:
    """Every source and weight of all three stages, from the published steps on."""
    ours = load_recipe("smollm3-3b", ["variables.SMOLLM3_DATA=/nvme"]).recipe
    published = load("stage3").recipe
    for mine, theirs in zip(ours.data_stages, published.data_stages, strict=True):
        assert (mine.name, mine.start_training_step, mine.data.seed) == (theirs.name, theirs.start_training_step, 6)
        folders = [folder.replace("s3://bucket/tokenized", "/nvme") for folder in theirs.data.dataset.dataset_folder]
        assert mine.data.dataset.dataset_folder == folders
        assert mine.data.dataset.dataset_weights == theirs.data.dataset.dataset_weights
    assert [stage.start_training_step for stage in ours.data_stages] == [1, 3_450_001, 4_198_001]
    assert [len(stage.data.dataset.dataset_folder) for stage in ours.data_stages] == [41, 46, 56]
    assert ours.tokens.train_steps == published.tokens.train_steps


def test_urls_pass_with_a_note_and_only_for_what_is_read() -> None:
    notes = load("stage2").notes
    assert any(
        note.startswith("checkpoints.resume_checkpoint_path: 's3://bucket/checkpoints/stage2': ") for note in notes
    )
    read = "(and 54 more): read from a copy on this machine, which `data stage` makes, or pretrain before the run"
    assert sum(read in note for note in notes) == 1
    without = load("stage1", "data_stages.0.data.dataset.dataset_read_path=null").notes
    assert sum("(and 40 more): expected a dataset_read_path, or data_staging.path" in note for note in without) == 1
    with pytest.raises(UserError, match=r"checkpoints\.checkpoints_path: 's3://b': expected a path of this machine"):
        load("stage2", "checkpoints.checkpoints_path=s3://b")
    loaded = load("stage2", "s3_upload=null", "checkpoints.resume_checkpoint_path=null")
    assert loaded.recipe.data_stages[1].data.dataset.dataset_folder[2] == "s3://bucket/tokenized/pes2o"


def test_the_evaluation_of_a_published_file_is_read() -> None:
    evaluation = load("stage1").recipe.lighteval
    assert evaluation is not None and (evaluation.eval_interval, evaluation.batch_size) == (4000, 8)
    assert (evaluation.slurm.partition, evaluation.slurm.time) == ("hopper-prod", "01:59:00")
    assert evaluation.offline_tasks == ["loss", "arithmetic"]
