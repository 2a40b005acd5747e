"""What a cluster profile says of section `slurm`, in recipes that are shown and in the recipe of a job."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster.submit import Submission, submit
from nanotron_recipes.cluster_profiles import job_resources, load_profile
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe, recipe_from_mapping
from nanotron_recipes.recipe import Recipe

PROFILE = {"slurm": {"partition": "gpus", "account": "team", "gpus_per_node": 4, "signal_seconds": 120}}


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """A profile in a file of the user's."""
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))
    return str(tmp_path / "cluster.yaml")


def shown(mapping: dict[str, Any]) -> Recipe:
    """What a recipe that was made with `show` says."""
    recipe = recipe_from_mapping(mapping).recipe
    again = recipe_from_mapping(yaml.safe_load(dump_yaml(recipe))).recipe
    assert again == recipe
    return again


def test_a_recipe_made_with_show_leaves_to_the_profile_what_it_had_left_out(
    small_recipe: dict[str, Any], profile: str
) -> None:
    resources, _ = job_resources(shown({**small_recipe, "slurm": {"profile": profile, "account": "mine"}}))
    assert (resources.partition, resources.account) == ("gpus", "mine")
    assert (resources.gpus_per_node, resources.signal_seconds) == (4, 120)


def test_what_a_recipe_writes_goes_before_the_profile_also_where_it_is_the_default(
    small_recipe: dict[str, Any], profile: str
) -> None:
    written = {"profile": profile, "partition": None, "gpus_per_node": 8}
    resources, _ = job_resources(shown({**small_recipe, "slurm": written}))
    assert (resources.partition, resources.gpus_per_node, resources.account) == (None, 8, "team")


def test_the_recipe_of_a_job_has_what_the_profile_said(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 41\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    list(submit(Submission(load_recipe("tiny", [f"slurm.profile={profile}"]), 2)))
    Path(profile).write_text("{}")
    resources, _ = job_resources(load_recipe("runs/tiny-1/jobs/1/tiny.yaml").recipe)
    assert (resources.partition, resources.account, resources.gpus_per_node) == ("gpus", "team", 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"environment": [{"name": "2X", "value": "1", "reason": "why"}]},
            "'2X': expected the name of an environment variable (letters a to z, digits and _)",
        ),
        (
            {"environment": [{"name": "X", "value": "1", "reason": ""}]},
            "'': expected text of one line, and not empty",
        ),
        (
            {"environment": [{"name": "X", "value": "1\n2", "reason": "why"}]},
            "'1\\n2': expected text of one line",
        ),
        ({"slurm": {"time": "soon"}}, "'soon': expected a time as sbatch writes it"),
    ],
)
def test_what_is_wrong_in_a_profile_is_said_in_words(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as refusal:
        load_profile(str(file))
    assert str(refusal.value).startswith(f"{file}: ") and expected in str(refusal.value)


def test_minutes_in_a_profile_are_a_time_limit(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("slurm: {time: 90}\n")
    recipe = load_recipe("tiny", [f"slurm.profile={tmp_path}/cluster.yaml"]).recipe
    assert job_resources(recipe)[0].time == "90"
