"""The schema explains itself and stays in step with the model."""

import json
import subprocess
import sys

import pytest

from model.arithmetic import parameter_shapes
from nanotron_recipes.cluster_profiles import Profile
from nanotron_recipes.fields import all_keys, keys_without_effect
from nanotron_recipes.loading import dump_yaml, load_recipe, recipe_from_mapping
from nanotron_recipes.numbers import short_number
from nanotron_recipes.parameters import is_decayed, parameter_names
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import Section
from nanotron_recipes.yaml_text import parse_yaml

KEYS = dict(all_keys())


@pytest.mark.parametrize("path", KEYS)
def test_every_key_has_a_docstring_and_a_reason_where_it_has_no_effect(path: str) -> None:
    key = KEYS[path]
    assert key.field.description and len(key.field.description) > 10
    assert key.no_effect is None or len(key.no_effect) > 10


@pytest.mark.parametrize("schema", [Recipe, Profile])
def test_a_form_of_text_is_said_in_words(schema: type[Section]) -> None:
    """pydantic's own pattern would be shown as it is."""
    assert '"pattern"' not in json.dumps(schema.model_json_schema())


@pytest.mark.parametrize(("written", "time"), [("90", "90"), ("0", "0"), ("12:00:00", "12:00:00"), ("1-12", "1-12")])
def test_a_time_limit_is_read_as_sbatch_would(written: str, time: str) -> None:
    recipe = load_recipe("tiny", [f"slurm.time={written}"]).recipe
    assert recipe.slurm.time == time
    assert recipe_from_mapping(parse_yaml(dump_yaml(recipe), "a dump")).recipe == recipe


def test_the_keys_are_all_there() -> None:
    assert len(KEYS) > 150
    assert KEYS["data_stages"].repeated and KEYS["data_stages[].data.dataset.dataset_folder"].section is None


def test_keys_without_effect_are_found_once_over_all_stages() -> None:
    stage = {"data": {"dataset": {"tokenizer_name": "x", "return_positions": True}}}
    found = [path for path, _ in keys_without_effect({"data_stages": [stage, stage], "general": {"run": "x"}})]
    assert found == [
        "data_stages[].data.dataset.tokenizer_name",
        "data_stages[].data.dataset.return_positions",
        "general.run",
    ]


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.model_config.tie_word_embeddings=false"], ["model.model_config.use_qk_norm=true"]],
)
def test_the_parameter_names_are_those_of_the_model(overrides: list[str]) -> None:
    recipe = load_recipe("tiny", overrides).recipe
    assert parameter_names(recipe) == list(parameter_shapes(recipe))


def test_tiny_decays_the_matrices_of_its_layers_only() -> None:
    recipe = load_recipe("tiny", ["model.model_config.use_qk_norm=true"]).recipe
    exclude = recipe.optimizer.weight_decay_exclude_named_params
    decayed = {name.rpartition("pp_block.")[2] for name in parameter_names(recipe) if is_decayed(name, exclude)}
    assert decayed == {
        f"{part}.weight" for part in ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }


def test_every_fourth_layer_has_no_rope() -> None:
    assert load_recipe("tiny").recipe.model.architecture.rope_layers == (True, True, True, False, True, True)
    every = load_recipe("tiny", ["model.model_config.no_rope_layer=null"]).recipe.model.architecture
    assert all(every.rope_layers)


def test_reading_a_recipe_imports_neither_torch_nor_nanotron() -> None:
    code = "import sys; from nanotron_recipes.loading import load_recipe; load_recipe('tiny'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "nanotron", "transformers", "datatrove", "numpy"}.intersection(loaded)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "7"),
        (361_280, "361K"),
        (3_379_200, "3.38M"),
        (3_075_098_624, "3.08B"),
        (11.1e12, "11.1T"),
        (999_600, "1.00M"),
    ],
)
def test_numbers_are_shown_in_three_digits(number: float, text: str) -> None:
    assert short_number(number) == text
