"""${NAME} in a recipe."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.sources import open_sources
from launch.train.prepare import check_trainable
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import LoadedRecipe, dump_yaml, load_recipe, recipe_from_mapping
from nanotron_recipes.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]


def load(mapping: dict[str, Any], *overrides: str, **variables: Any) -> LoadedRecipe:
    stage = {"name": "a", "start_training_step": 1, "data": {"dataset": {"dataset_folder": ["${SHARDS}/x", "/y"]}}}
    return recipe_from_mapping({**mapping, "data_stages": [stage], "variables": variables or None}, overrides=overrides)


def folders(loaded: LoadedRecipe) -> list[str]:
    return loaded.recipe.data_stages[0].data.dataset.dataset_folder


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDS", raising=False)
    monkeypatch.delenv("SMOLLM3_DATA", raising=False)


def test_the_section_gives_a_value_and_the_resolved_recipe_has_it(small_recipe: dict[str, Any]) -> None:
    loaded = load(small_recipe, SHARDS="/nvme")
    assert folders(loaded) == ["/nvme/x", "/y"] and not any("SHARDS" in note for note in loaded.notes)
    assert recipe_from_mapping(parse_yaml(dump_yaml(loaded.recipe), "again")).recipe == loaded.recipe


def test_the_command_line_gives_a_value(small_recipe: dict[str, Any]) -> None:
    assert folders(load(small_recipe, "variables.SHARDS=/there")) == ["/there/x", "/y"]


def test_the_environment_gives_a_value_where_the_section_does_not(
    small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS", "/env")
    assert folders(load(small_recipe)) == ["/env/x", "/y"]
    assert folders(load(small_recipe, SHARDS="/section")) == ["/section/x", "/y"]


def test_without_a_value_it_is_a_note_and_whatever_reads_data_refuses(small_recipe: dict[str, Any]) -> None:
    loaded = load(small_recipe)
    assert loaded.notes[0].startswith(
        "variables.SHARDS: not set, and data_stages.0.data.dataset.dataset_folder.0 needs"
    )
    for refuses in (check_trainable, open_sources):
        with pytest.raises(
            UserError, match=r"dataset_folder\.0: \$\{SHARDS\} is not set; expected --set variables\.SH"
        ):
            refuses(loaded.recipe)
    assert "${SHARDS}/x" in dump_yaml(loaded.recipe)


def test_a_value_that_nothing_names_is_noted_with_the_nearest_name(small_recipe: dict[str, Any]) -> None:
    notes = load(small_recipe, SHARD="/nvme").notes
    assert "variables.SHARD: not used: nothing in the recipe says ${SHARD}; did you mean SHARDS?" in notes


def test_a_value_that_is_no_text_is_refused_by_its_name(small_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^recipe: variables\.SHARDS: 3: expected text"):
        load(small_recipe, SHARDS=3)
    with pytest.raises(UserError, match=r"^--set: variables\.OTHER: 3: expected text"):
        load(small_recipe, "variables.OTHER=3", SHARDS="/nvme")


def test_a_value_may_name_variables_of_the_environment_and_no_other_value(
    small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "/env/${SHARDS}")
    assert folders(load(small_recipe, "variables.SHARDS=${SOMEWHERE}/d"))[0] == "/env/${SHARDS}/d/x"
    monkeypatch.setenv("SHARDS", "/shards")
    assert folders(load(small_recipe, SHARDS="${SHARDS}/own"))[0] == "/shards/own/x"
    loaded = load(small_recipe, SHARDS="${ROOT}/d", ROOT="/root")
    with pytest.raises(UserError, match=r"dataset_folder\.0: \$\{ROOT\} is not set; expected an environment"):
        check_trainable(loaded.recipe)


def test_the_prologue_of_a_job_is_left_to_the_shell_of_the_node(
    small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS", "/here")
    prologue = "export TMPDIR=${SHARDS}/${NODE_ONLY}"
    loaded = load({**small_recipe, "slurm": {"prologue": prologue, "partition": "${SHARDS}"}})
    assert (loaded.recipe.slurm.prologue, loaded.recipe.slurm.partition) == (prologue, "/here")
    check_trainable(loaded.recipe)
    assert not any("NODE_ONLY" in note for note in loaded.notes)


@pytest.mark.parametrize("text", ["${SHARDS:-/nvme}/x", "${SHARDS-b}", "${", "a${b", "${}", "${A}/${B:+c}"])
@pytest.mark.parametrize("key", ["checkpoints.checkpoints_path", "slurm.partition", "variables.UNUSED"])
def test_what_a_shell_would_fill_in_another_way_is_refused_by_its_key(key: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", [f'{key}="{text}"'])
    assert f"{key}: '{text}': expected ${{NAME}} and no default in it" in str(caught.value)


def test_a_default_in_the_value_of_a_variable_is_refused_where_it_is_used(small_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"dataset_folder\.0: '\$\{ROOT:-/a\}/x': expected \$\{NAME\}"):
        load(small_recipe, SHARDS="${ROOT:-/a}")


def test_texts_for_the_shell_and_for_people_and_expressions_stay_as_they_are() -> None:
    kept = ["slurm.prologue='export A=${B:-c}'", "general.purpose='${A:-b} is not known'"]
    recipe = load_recipe(
        "tiny", [*kept, "optimizer.weight_decay_exclude_named_params=['.*norm.*(\\.weight)?${,1}']"]
    ).recipe
    assert (recipe.slurm.prologue, recipe.general.purpose) == ("export A=${B:-c}", "${A:-b} is not known")


@pytest.mark.parametrize("key", ["data_stages.0.data.dataset.dataset_folder.0", "corpus.upload_to"])
def test_a_place_on_s3_whose_bucket_is_not_known_yet_is_noted_by_the_name_that_lacks(key: str) -> None:
    notes = load_recipe("tiny", [f"{key}=s3://${{SHARDS}}/prose"]).notes
    assert any(note.startswith(f"variables.SHARDS: not set, and {key} needs it") for note in notes)
    with pytest.raises(UserError, match=r"expected (a path of this machine, or )?s3://bucket/prefix"):
        load_recipe("tiny", [f"{key}=s3://${{SHARDS}}/prose", "variables.SHARDS=/"])


def test_the_shipped_recipe_is_noted_until_its_data_has_a_place() -> None:
    assert any("variables.SMOLLM3_DATA: not set" in note for note in load_recipe("smollm3-3b").notes)
    placed = load_recipe("smollm3-3b", ["variables.SMOLLM3_DATA=/nvme"])
    assert not any("SMOLLM3_DATA" in note for note in placed.notes)
    assert "${" not in dump_yaml(placed.recipe)


@pytest.mark.parametrize("command", [["tokenize"], ["pretrain", "--launcher", "local"]])
def test_commands_that_read_data_end_with_2_and_name_it(command: list[str]) -> None:
    code = "from launch.cli.main import main; main()"
    arguments = [command[0], "smollm3-3b", *command[1:]]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "${SMOLLM3_DATA} is not set" in done.stderr
