"""YAML, overrides, older spellings, and the way back to YAML."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_recipes.errors import UserError
from nanotron_recipes.fields import all_keys
from nanotron_recipes.loading import dump_yaml, load_recipe, recipe_from_mapping, shipped_recipes
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.paths import LOCAL_PATHS, paths_of
from nanotron_recipes.topology import global_batch_size
from nanotron_recipes.yaml_text import line_of, parse_yaml, to_yaml


def raw(name: str) -> dict[str, Any]:
    mapping: dict[str, Any] = parse_yaml(shipped_recipes()[name].read_text(), name)
    return mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("0", 0),
        ("-7", -7),
        ("10:00:00", "10:00:00"),
        ("2026-01-01", "2026-01-01"),
        ("007", "007"),
        ("1e5x", "1e5x"),
        (".*norm.*", ".*norm.*"),
        ("'2e-4'", "2e-4"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        ("yes", True),
        ("null", None),
        ("~", None),
    ],
)
def test_a_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "text")
    assert parsed == value and type(parsed) is type(value)


scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
)
strings_like_numbers = st.from_regex(r"[-+0-9.eE_:x]{1,8}", fullmatch=True)
values = st.recursive(
    scalars | strings_like_numbers,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4),
)


@settings(deadline=None)
@given(value=values)
def test_what_is_written_reads_back(value: object) -> None:
    assert parse_yaml(to_yaml(value), "text") == value


def test_anchors_and_merges_work_and_a_merged_key_may_be_replaced() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n"
    assert parse_yaml(text, "text")["other"] == {"a": 1, "b": 3}


def test_a_key_twice_in_one_place_is_found_at_any_depth() -> None:
    with pytest.raises(UserError, match=r"the key 'b' stands twice in one place \(line 3\)"):
        parse_yaml("a:\n  - b: 1\n    b: 2\n", "text")


def test_lines_are_found_through_lists_and_fall_back_to_the_section() -> None:
    text = "a:\n  b:\n    - c: 1\n      d: 2\n"
    assert [line_of(text, key) for key in ("a", "a.b", "a.b.0.d", "a.b.0.zzz", "zzz")] == [1, 2, 4, 3, None]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_clean_and_reads_back_equal(name: str) -> None:
    loaded = load_recipe(name)
    # Where the data lies is given on the machine, and the published weights do not sum to 1.
    noted = [note.partition(": ")[0] for note in loaded.notes]
    weights = [f"data_stages.{stage}.data.dataset.dataset_weights" for stage in (1, 2)]
    assert noted == ([] if name == "tiny" else ["variables.SMOLLM3_DATA", *weights]) and loaded.name == name
    again = recipe_from_mapping(parse_yaml(dump_yaml(loaded.recipe), name))
    assert again.recipe == loaded.recipe and again.notes == loaded.notes


OVERRIDES = {
    "tokens.train_steps": st.integers(900, 10**7),
    "general.seed": st.integers(0, 2**32),
    "optimizer.weight_decay": st.floats(0, 1),
    "optimizer.clip_grad": st.none() | st.floats(0.1, 10),
    "optimizer.learning_rate_scheduler.learning_rate": st.floats(1e-8, 1),
    "optimizer.learning_rate_scheduler.lr_decay_style": st.sampled_from(["linear", "cosine", "1-sqrt"]),
    "model.dtype": st.sampled_from(["float32", "bfloat16"]),
    "model.model_config.no_rope_layer": st.none() | st.integers(1, 8),
    "model.model_config._use_doc_masking": st.booleans(),
    "parallelism.dp": st.sampled_from(["auto", 1, 2, 3]),
    "general.run": st.text(max_size=12),
    "general.purpose": st.text(max_size=30),
    "slurm.prologue": strings_like_numbers,
    "data_stages.1.data.dataset.dataset_weights": st.none() | st.lists(st.floats(0.01, 9), min_size=3, max_size=3),
}


@settings(deadline=None, max_examples=25)
@given(changes=st.fixed_dictionaries({}, optional=OVERRIDES))
def test_overridden_recipes_round_trip_and_resolve_to_a_fixed_point(changes: dict[str, Any]) -> None:
    recipe = load_recipe("tiny", [f"{key}={json.dumps(value)}" for key, value in changes.items()]).recipe
    text = dump_yaml(recipe)
    again = recipe_from_mapping(parse_yaml(text, "text")).recipe
    assert again == recipe and dump_yaml(again) == text


def test_overrides_reach_lists_and_absent_sections_and_leave_the_mapping_alone() -> None:
    mapping = {"a": [{"b": 1}, {"b": 2}], "profiler": None}
    changed, keys = apply_overrides(mapping, ["a.1.b=3", "a.2={b: 4}", "profiler.path=x", "new.deep.key=1e-3", "e="])
    assert changed == {
        "a": [{"b": 1}, {"b": 3}, {"b": 4}],
        "profiler": {"path": "x"},
        "new": {"deep": {"key": 1e-3}},
        "e": None,
    }
    assert mapping == {"a": [{"b": 1}, {"b": 2}], "profiler": None}
    assert keys == ["a.1.b", "a.2", "profiler.path", "new.deep.key", "e"]


def test_a_later_override_wins_and_a_value_may_hold_an_equals_sign() -> None:
    recipe = load_recipe("tiny", ["general.purpose=x", "general.purpose='a=b'"]).recipe
    assert recipe.general.purpose == "a=b"


def test_older_spellings_of_nanotron_are_read_with_a_note() -> None:
    mapping = raw("tiny")
    mapping["data"] = mapping.pop("data_stages")[0]["data"]
    mapping["optimizer"] |= mapping["optimizer"].pop("optimizer_factory")
    del mapping["optimizer"]["name"]
    loaded = recipe_from_mapping(mapping)
    expected = load_recipe("tiny").recipe
    assert loaded.recipe.optimizer == expected.optimizer
    assert [stage.start_training_step for stage in loaded.recipe.data_stages] == [1]
    assert loaded.recipe.data_stages[0].data == expected.data_stages[0].data
    assert len(loaded.notes) == 2 and all("older spelling" in note for note in loaded.notes)


def test_older_spellings_work_in_overrides_too() -> None:
    mapping = raw("tiny")
    del mapping["optimizer"]["optimizer_factory"]
    loaded = recipe_from_mapping(mapping, overrides=["optimizer.adam_beta2=0.99"])
    assert loaded.recipe.optimizer.optimizer_factory.adam_beta2 == 0.99


def test_both_spellings_at_once_are_an_error() -> None:
    with pytest.raises(UserError, match=r"optimizer\.adam_beta1: 0\.5: unknown key"):
        load_recipe("tiny", ["optimizer.adam_beta1=0.5"])


def test_nulls_mean_what_they_mean_in_nanotron() -> None:
    overrides = ["general.seed=null", "model.dtype=null", "parallelism.pp_engine=null", "parallelism.tp_mode=null"]
    recipe = load_recipe("tiny", overrides).recipe
    assert (recipe.general.seed, recipe.model.dtype) == (42, "bfloat16")
    assert (recipe.parallelism.pp_engine, recipe.parallelism.tp_mode) == ("afab", "ALL_REDUCE")


def test_modes_are_read_in_either_case() -> None:
    recipe = load_recipe("tiny", ["parallelism.tp_mode=all_reduce", "parallelism.pp_engine=AFAB"]).recipe
    assert (recipe.parallelism.tp_mode, recipe.parallelism.pp_engine) == ("ALL_REDUCE", "afab")


def test_a_single_folder_is_a_list_of_one() -> None:
    overrides = ["data_stages.0.data.dataset.dataset_folder=code", "data_stages.0.data.dataset.dataset_weights=null"]
    assert load_recipe("tiny", overrides).recipe.data_stages[0].data.dataset.dataset_folder == ["code"]


def test_the_corpus_lies_under_the_recipes_name_where_no_path_is_given(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped_recipes()["tiny"].read_text())
    corpora = [
        load_recipe(*arguments).recipe.corpus for arguments in (("tiny",), (str(copy),), ("tiny", ["corpus.path=x"]))
    ]
    assert [corpus and corpus.path for corpus in corpora] == ["corpora/tiny", "corpora/mine", "x"]


@pytest.mark.parametrize(
    "overrides",
    [["parallelism.dp=2"], ["tokens.micro_batch_size=1"], ["parallelism.dp=3", "tokens.micro_batch_size=2"]],
)
def test_a_changed_topology_does_not_change_the_batch_of_a_file_in_nanotrons_manner(overrides: list[str]) -> None:
    mapping = raw("tiny")
    mapping["parallelism"]["dp"] = 4
    mapping["tokens"] |= {"micro_batch_size": 3, "batch_accumulation_per_replica": 2}
    del mapping["tokens"]["global_batch_size"]
    loaded = recipe_from_mapping(mapping, overrides=overrides)
    assert global_batch_size(loaded.recipe) == 24
    assert [note.split(":")[0] for note in loaded.notes] == ["tokens.global_batch_size"]
    explicit = recipe_from_mapping(mapping, overrides=[*overrides[:1], "tokens.batch_accumulation_per_replica=5"])
    assert global_batch_size(explicit.recipe) != 24 and explicit.notes == []


def test_a_home_folder_is_expanded_in_every_path_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-a-test")
    recipe = load_recipe(
        "tiny",
        [
            "checkpoints.checkpoints_path=~/c",
            "checkpoints.resume_checkpoint_path=~/r",
            "corpus.path=~/t",
            "corpus.sources.0={name: prose, reader: text, path: ~/texts}",
            "data_stages.0.data.dataset.dataset_folder=[prose, ~/shards, a~b]",
            "tokenizer={tokenizer_name_or_path: ~/tok}",
            "profiler={profiler_export_path: ~/p}",
            "general.purpose=~/c",
        ],
    ).recipe
    assert [path for key in LOCAL_PATHS for _, path in paths_of(recipe, key)][:8] == [
        "/home-of-a-test/c",
        "/home-of-a-test/r",
        "/home-of-a-test/t",
        "/home-of-a-test/texts",
        "prose",
        "/home-of-a-test/shards",
        "a~b",
        "prose",
    ]
    assert recipe.tokenizer.tokenizer_name_or_path == "/home-of-a-test/tok"
    assert recipe.profiler is not None and recipe.profiler.profiler_export_path == "/home-of-a-test/p"
    assert recipe.general.purpose == "~/c"
    assert recipe_from_mapping(parse_yaml(dump_yaml(recipe), "text")).recipe == recipe


def test_every_key_that_names_a_path_is_known_as_one() -> None:
    """`glob` is no path, upload_s3_path none of this machine, and lighteval and benchmark_csv_path have no effect."""
    named = {
        path.replace("[]", "")
        for path, key in all_keys()
        if path.rpartition(".")[2].endswith(("path", "folder")) and not key.no_effect
    }
    assert {key for key in named if not key.startswith(("lighteval.", "s3_upload."))} == set(LOCAL_PATHS)


def test_a_glob_needs_no_quotes_of_yaml() -> None:
    recipe = load_recipe("tiny", ["corpus.sources.0.glob=**/*.txt"]).recipe
    assert recipe.corpus is not None and recipe.corpus.sources[0].glob == "**/*.txt"


def test_a_pipe_and_a_device_are_named_as_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, kind in ((tmp_path / "pipe", "pipe"), (Path(os.devnull), "device")):
        with pytest.raises(UserError, match=f"{file}: expected a recipe file, which can be read again, found a {kind}"):
            load_recipe(str(file))
