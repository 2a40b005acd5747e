"""What a cluster profile says of section `slurm`, in recipes that are shown and in the recipe of a job."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster.submit import Submission, submit
from nanotron_recipes.cluster_profiles import job_resources
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
