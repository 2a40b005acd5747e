"""Shards go from a node of a job that has them to one that lacks them, and the store is not asked for those."""

import os
import shutil
from pathlib import Path

from data.staging import plan_staging, stage
from data.transfer import Watch
from launch.cluster.local import Meeting
from launch.cluster.neighbours import fetch_from_neighbours
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from parallel.rank_pool import RankPool, free_port


def on_disk(file: Path, disk: Path) -> Recipe:
    return load_recipe(str(file), [f"data_staging.path={disk}"]).recipe


def ask(file: Path, disks: list[Path], port: int) -> int:
    """What each of two nodes calls."""
    node = int(os.environ["RANK"])
    staging = plan_staging(on_disk(file, disks[node]))
    return fetch_from_neighbours(staging, Meeting(node, 2, "127.0.0.1", port, f"node{node}"))


def test_a_node_gets_what_it_lacks_and_only_that(pool: RankPool, small_file: Path, tmp_path: Path) -> None:
    full, fresh = tmp_path / "full", tmp_path / "fresh"
    recipe = on_disk(small_file, full)
    stage(recipe, plan_staging(recipe), Watch())
    shards = sorted(path.relative_to(full) for path in full.rglob("*.ds*"))
    (fresh / shards[0]).parent.mkdir(parents=True)
    shutil.copy(full / shards[0], fresh / shards[0])

    assert pool.run(2, ask, small_file, [full, fresh], free_port()) == [0, len(shards) - 1]
    assert pool.run(2, ask, small_file, [full, fresh], free_port()) == [0, 0]

    assert all((fresh / shard).read_bytes() == (full / shard).read_bytes() for shard in shards)
    late = on_disk(small_file, fresh)
    stage(late, plan_staging(late), Watch())
    assert plan_staging(late).bytes_to_stage == 0
    assert not list(fresh.rglob(".*incoming*"))
