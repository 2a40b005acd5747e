"""Checkpoints on disks that only one node sees: nothing is lost that lies on a node which is still there."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist

from launch.train.parity import FLOAT32, start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.errors import UserError
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.schedule import learning_rate_at
from parallel.checkpoint import load_checkpoint, wanted_tensors
from parallel.checkpoint_disks import find_disks, one_disk
from parallel.checkpoint_fetch import fetch_parts
from parallel.checkpoint_files import FileEntry, describe_file, read_manifest, verify_checkpoint_files
from parallel.checkpoint_saver import CheckpointSaver
from parallel.checkpoint_search import first_sound_checkpoint, steps_on_all_disks
from parallel.checkpoint_transfer import Transfer, spread, transfer_files
from parallel.checkpoint_writer import CheckpointInfo
from parallel.rank_pool import RankFailure, RankPool
from parallel.together import FailedTogether

NODES = ["a", "b", "c"]


def node_of(rank: int, world_size: int, nodes: list[str]) -> str:
    return nodes[rank * len(nodes) // world_size]


def train(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        batch = synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank)
        losses.append(engine.train_step(batch, learning_rate_at(engine.recipe, step)).loss)
    return losses


def save_on_rank(mapping: dict[str, object], base: Path, nodes: list[str], copies: int) -> tuple[list[float], Any]:
    """Saves after steps 2 and 4; the losses of 3 to 6."""
    engine = start_engine(mapping)
    node = node_of(engine.context.rank, torch_dist.get_world_size(), nodes)
    disks = find_disks(base / node, node)
    saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context, disks)
    losses = []
    for step in (2, 4):
        losses += train(engine, step - 1, step)
        info = CheckpointInfo(base / node / str(step), {"step": step}, {"note.txt": "text"}, copies=copies)
        saver.start(info)
    saver.wait()
    losses += train(engine, 5, 6)
    errors = [outcome.error for outcome in saver.finished()]
    engine.context.destroy()
    return losses, errors


def resume_on_rank(
    mapping: dict[str, object], base: Path, nodes: list[str], scratch: bool
) -> tuple[int, dict[int, str], list[float]]:
    """The step it went on from, what was refused, and the losses up to step 6."""
    engine = start_engine(mapping)
    node = node_of(engine.context.rank, torch_dist.get_world_size(), nodes)
    folder = base / node
    disks = find_disks(folder, node)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    newest_first = reversed(steps_on_all_disks(steps))
    step, sound, refused = first_sound_checkpoint(folder, newest_first, disks)
    losses: list[float] = []
    if sound is not None:
        aside = base / f"scratch-{node}" if scratch else None
        tensors = partial(wanted_tensors, buckets=engine.built.buckets, optimizer=engine.optimizer)
        place = fetch_parts(sound, folder / str(step), tensors, disks, scratch=aside)
        load_checkpoint(place, engine.built.buckets, engine.optimizer)
        losses = train(engine, step + 1, 6)
    engine.context.destroy()
    return step, refused, losses


def at(recipe: dict[str, Any], dp: int, pp: int, tp: int, zero: int) -> tuple[int, dict[str, Any]]:
    overlay = [f"parallelism.dp={dp}", f"parallelism.pp={pp}", f"parallelism.tp={tp}", f"optimizer.zero_stage={zero}"]
    return dp * pp * tp, apply_overrides(recipe, overlay)[0]


def save(pool: RankPool, recipe: dict[str, Any], base: Path, nodes: list[str], copies: int) -> list[float]:
    world_size, mapping = at(recipe, 2, 1, 2, 1)
    losses, errors = pool.run(world_size, save_on_rank, mapping, base, nodes, copies)[0]
    assert errors == [None, None]
    return losses


def resume(pool: RankPool, recipe: dict[str, Any], base: Path, nodes: list[str], topology: Any, scratch: bool = False):  # type: ignore[no-untyped-def]
    world_size, mapping = at(recipe, *topology)
    return pool.run(world_size, resume_on_rank, mapping, base, nodes, scratch)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_node_keeps_its_parts_and_a_resume_on_other_nodes_at_another_topology_fetches_the_rest(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = save(pool, small_recipe, tmp_path, ["a", "b"], copies=1)
    parts = {node: {path.name for path in (tmp_path / node / "4").glob("*.distcp")} for node in "ab"}
    assert parts == {"a": {"__0_0.distcp", "__1_0.distcp"}, "b": {"__2_0.distcp", "__3_0.distcp"}}
    manifest = read_manifest(tmp_path / "a" / "4")
    assert manifest == read_manifest(tmp_path / "b" / "4")
    assert manifest.entry("__3_0.distcp").nodes == ("b",)  # type: ignore[union-attr]
    assert [str(problem) for problem in verify_checkpoint_files(tmp_path / "a" / "4")] == [
        f"__{rank}_0.distcp: is not here: it was written to node b" for rank in (2, 3)
    ]
    for topology, nodes in (((1, 3, 1, 0), ["c", "b", "a"]), ((2, 1, 1, 1), ["b", "a"])):
        step, refused, losses = resume(pool, small_recipe, tmp_path, nodes, topology)
        assert (step, refused) == (4, {})
        assert losses == pytest.approx(undisturbed[4:], abs=FLOAT32.loss)
    # The node that had nothing now has a checkpoint of its own, with what its ranks needed.
    assert read_manifest(tmp_path / "c" / "4") == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_loss_of_one_node_costs_nothing_with_two_copies_and_a_damaged_part_is_replaced(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = save(pool, small_recipe, tmp_path, NODES[:2], copies=2)
    shutil.rmtree(tmp_path / "a")
    _, _, losses = resume(pool, small_recipe, tmp_path, ["c", "b"], (2, 1, 2, 1))
    assert losses == undisturbed[4:]
    part = tmp_path / "b" / "4" / "__1_0.distcp"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    step, refused, losses = resume(pool, small_recipe, tmp_path, ["b", "c"], (2, 1, 2, 1))
    assert (step, refused, losses) == (4, {}, undisturbed[4:])
    assert part.read_bytes() == whole


def test_with_one_copy_the_newest_step_that_is_whole_is_taken_and_the_lost_ones_are_named(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = save(pool, small_recipe, tmp_path, ["a", "b"], copies=1)
    (tmp_path / "a").rename(tmp_path / "gone")
    step, refused, _ = resume(pool, small_recipe, tmp_path, ["c", "b"], (2, 1, 2, 1))
    lost = "__0_0.distcp: is not here: it was written to node a (and 1 more)"
    assert (step, refused) == (0, {2: lost, 4: lost})
    (tmp_path / "gone").rename(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "4")
    step, refused, losses = resume(pool, small_recipe, tmp_path, ["a", "b"], (2, 1, 2, 1))
    assert (step, refused, losses) == (2, {4: lost}, undisturbed[2:])


def test_a_branch_leaves_the_parents_folders_as_they_are(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = save(pool, small_recipe, tmp_path, ["a", "b"], copies=1)
    before = {node: files(tmp_path / node) for node in "ab"}
    step, _, losses = resume(pool, small_recipe, tmp_path, ["a", "b"], (1, 1, 2, 0), scratch=True)
    assert step == 4 and losses == pytest.approx(undisturbed[4:], abs=FLOAT32.loss)
    assert {node: files(tmp_path / node) for node in "ab"} == before
    assert (tmp_path / "scratch-a" / "__0_0.distcp").is_symlink()


def find_on_rank(mapping: dict[str, object], base: Path, folders: list[str], is_shared: bool) -> Any:
    engine = start_engine(mapping)
    rank = engine.context.rank
    try:
        return find_disks(base / folders[rank], f"node-{rank}", is_shared=is_shared)
    finally:
        engine.context.destroy()


def test_ranks_that_see_each_others_files_share_a_disk(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    small_recipe["parallelism"] |= {"dp": 2, "tp": 2}
    found = pool.run(4, find_on_rank, small_recipe, tmp_path, ["x", "y", "x", "y"], False)
    assert [(disks.of_rank, disks.names, disks.leaders) for disks in found] == [
        ((0, 1, 0, 1), ("node-0", "node-1"), (0, 1))
    ] * 4
    assert [disks.share for disks in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    shared = pool.run(4, find_on_rank, small_recipe, tmp_path, ["x"] * 4, True)
    assert {disks.names for disks in shared} == {("node-0",)}
    assert list((tmp_path / "x").iterdir()) == []
    with pytest.raises(RankFailure, match="node node-1 does not see in"):
        pool.run(4, find_on_rank, small_recipe, tmp_path, ["x", "y", "x", "y"], True)


def transfer_on_rank(mapping: dict[str, object], base: Path, entry: FileEntry, plant: str) -> str:
    """What the transfer of a file from the first to the second of two nodes ends with."""
    engine = start_engine(mapping)
    node = "ab"[engine.context.rank]
    disks = find_disks(base / node, node)
    if plant == "full" and node == "b":
        shutil.rmtree(base / "b")
    try:
        transfer_files([Transfer(entry, 0, 1)], base / node, disks, None, into=base / node)
        return ""
    except FailedTogether as failure:
        return str(failure)
    finally:
        engine.context.destroy()


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        ("", ""),
        ("full", "no such file or directory"),
        ("changed", "what arrived is not what was written"),
        ("lost", "no such"),
    ],
)
def test_a_transfer_that_fails_is_known_to_all_and_leaves_nothing(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path, plant: str, reason: str
) -> None:
    small_recipe["parallelism"] |= {"dp": 2}
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "part"
    file.write_bytes(bytes(range(256)) * 1000)
    entry = describe_file(file)
    if plant == "changed":
        file.write_bytes(bytes(256_000))
    elif plant == "lost":
        file.unlink()
    for said in pool.run(2, transfer_on_rank, small_recipe, tmp_path, entry, plant):
        assert reason in said and bool(said) == bool(reason)
    received = tmp_path / "b" / "part"
    assert (received.read_bytes() == file.read_bytes()) if not plant else not received.exists()
    assert plant == "full" or [path.name for path in (tmp_path / "b").iterdir()] == ([] if plant else ["part"])


def test_the_sending_is_shared_out() -> None:
    entries = [FileEntry(f"part-{number}", 10, "") for number in range(4)]
    sources = [transfer.source for transfer in spread((entry, [0, 1], [2]) for entry in entries)]
    assert sorted(sources) == [0, 0, 1, 1]


def test_one_process_has_one_disk(tmp_path: Path) -> None:
    assert one_disk() == one_disk() and one_disk().is_leader
    with pytest.raises(UserError, match="cannot be written here"):
        (tmp_path / "file").write_text("")
        find_disks(tmp_path / "file", "here")
