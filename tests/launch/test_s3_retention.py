"""What lies on a local disk while a run saves and the store answers."""

import os
import time
from pathlib import Path
from typing import Any

from checkpoint_store import BUCKET, CheckpointStore

from launch.storage.uploads import Uploads
from launch.train.parity import start_engine
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from launch.train.saver import RunSaver
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.loading import dump_yaml
from parallel.checkpoint_disks import one_disk
from parallel.rank_pool import RankPool
from parallel.together import gather

KEEP_LAST = 2


def uploaded_steps(uploads: Uploads | None) -> list[int]:
    state = uploads.look() if uploads is not None else None
    return [one.step for one in state.uploaded] if state is not None else []


def save_on_rank(mapping: dict[str, Any], run: Path, environment: dict[str, str]) -> list[tuple[list[int], list[int]]]:
    """The steps on the disk, and those known to be in the store just before, again and again."""
    os.environ.update(environment)
    engine = start_engine(mapping)
    is_first = engine.context.rank == 0
    folder = RunFolder(run, run / "checkpoints")
    if is_first:
        folder.checkpoints.mkdir(parents=True)
        folder.write_recipe(dump_yaml(engine.recipe), RunHeader("small", "", "", run="a1"))
    gather(None)
    uploads = Uploads(folder, engine.recipe, "a", ("a",), "l") if is_first else None
    saver = RunSaver(folder, engine, {}, frozenset(), one_disk(), uploads=uploads)
    seen = []
    for step in range(1, 5):
        engine.train_step(synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank), 1e-3)
        saver.save(step, {"data": ""})
        saver.finish()
        seen.append((folder.steps(), uploaded_steps(uploads)))
    end = time.monotonic() + 60
    while is_first and (len(uploaded_steps(uploads)) < 4 or len(folder.steps()) > KEEP_LAST):
        before = uploaded_steps(uploads)
        saver.reports()
        seen.append((folder.steps(), before))
        assert time.monotonic() < end, seen[-1]
        time.sleep(0.02)
    saver.finish()
    seen.append((folder.steps(), uploaded_steps(uploads)))
    if uploads is not None:
        uploads.end()
    engine.context.destroy()
    return seen


def test_what_the_store_has_leaves_the_disk_at_once_and_not_with_the_next_save(
    pool: RankPool, small_recipe: dict[str, Any], store: CheckpointStore, tmp_path: Path
) -> None:
    small_recipe["parallelism"]["dp"] = 2
    small_recipe["checkpoints"] = {"keep_last": KEEP_LAST, "keep_every": 2}
    small_recipe["s3_upload"] = {"upload_s3_path": f"s3://{BUCKET}/team", "endpoint_url": store.url}
    store.faults.seconds_per_put = 0.5
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    seen, _ = pool.run(2, save_on_rank, small_recipe, tmp_path / "runs" / "kept", environment)
    assert seen[3] == ([1, 2, 3, 4], []), "it saves faster than the store takes it"
    for here, uploaded in seen:
        newest = max(here)
        assert set(here) >= set(range(1, newest + 1)) - set(uploaded), "what is not in the store stays"
        assert set(here) >= {newest, max(1, newest - 1)}
    assert seen[-1] == ([3, 4], [1, 2, 3, 4])
    assert store.whole_steps("kept", tmp_path) == [1, 2, 3, 4]
