"""Every rank finds out before the first step whether all nodes have the same data."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from small_pretraining import small_recipe

from data.manifest import read_manifest, write_manifest
from data.staging import plan_staging, stage
from data.transfer import Watch
from launch.train.same_data import open_same_data
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import recipe_from_mapping
from parallel.process_groups import init_process_group
from parallel.rank_pool import RankPool


def recipe_of_node(mapping: dict[str, Any], node: int, disks: Path) -> dict[str, Any]:
    """The recipe as a node has it whose disk is played by a folder."""
    return mapping | {"data_staging": {"path": str(disks / f"node{node}")}}


def opened_on_rank(mapping: dict[str, Any], disks: Path) -> tuple[str, str]:
    """The mistake that this rank tells, and the fingerprint of what it opened."""
    init_process_group(torch.device("cpu"))
    node = torch_dist.get_rank() + 1
    recipe = recipe_from_mapping(recipe_of_node(mapping, node, disks)).recipe
    try:
        return "", open_same_data(recipe, f"node{node}").fingerprint
    except UserError as error:
        return str(error), ""
    finally:
        torch_dist.destroy_process_group()


@pytest.fixture
def disks(small_folder: Path, tmp_path: Path) -> Path:
    """Two nodes with copies of all sources."""
    for node in (1, 2):
        recipe = recipe_from_mapping(recipe_of_node(small_recipe(small_folder), node, tmp_path)).recipe
        stage(recipe, plan_staging(recipe), Watch())
    return tmp_path


def test_ranks_that_have_the_same_go_on_and_otherwise_all_say_the_same(
    pool: RankPool, small_folder: Path, disks: Path
) -> None:
    mapping = small_recipe(small_folder)
    found = pool.run(2, opened_on_rank, mapping, disks)
    assert found[0] == found[1] and found[0][0] == "" != found[0][1]
    (folder,) = (path.parent for path in (disks / "node2").rglob("words/manifest.json"))
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"eos_token_id": manifest.eos_token_id + 1}))
    (said, _), (other, _) = pool.run(2, opened_on_rank, mapping, disks)
    assert said == other
    assert re.fullmatch(r"words: node2 has other data \(\w{12}\) than node1 \(\w{12}\); run .*data stage.*node", said)
    write_manifest(folder, manifest)
    (folder / manifest.train.files[0].name).touch()
    (said, _), (other, _) = pool.run(2, opened_on_rank, mapping, disks)
    assert said == other and re.search(r"^node2: .*\.ds: changed since it was staged \(time of change", said)
    shutil.rmtree(folder)
    (said, _), (other, _) = pool.run(2, opened_on_rank, mapping, disks)
    assert said == other and re.search(r"^node2: data_stages dataset_folder: words: .*: not staged yet", said)
