"""What a checkpoint costs: the step that saves, the run that saves, loading and resharding, beside plain torch.save
and nanotron's own format (its `save_weights` and `save_optimizer`).

    make bench-checkpoint        [ARGS="--rounds 10 --shape tiny --shape 135m"]

Two ranks at dp 2 with ZeRO-1 on gloo, one thread each, float32. A round is a block of steps without a save and a block
that begins with one and ends when it is on disk; which comes first changes every round. The checkpoints go to a
temporary folder on the disk of --folder.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.optimizer_step import nanotron_optimizer
from benchmarks.recompute_memory import SHAPE as SMOLLM2_135M
from benchmarks.report import Section, publish
from benchmarks.rounds import ratios, seconds_of, spread
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

SHAPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "tiny": ("tiny", (), "tp"),
    "135m": ("tiny", (*SMOLLM2_135M, "tokens.sequence_length=256", "tokens.global_batch_size=2"), "pp"),
}
"""Recipe, overrides, and along what the model is split over two ranks to read the checkpoint at another topology."""

AT_DP2 = ("parallelism.dp=2", "optimizer.zero_stage=1", "model.dtype=float32")
AT_MP2 = ("parallelism.dp=1", "optimizer.zero_stage=0", "model.dtype=float32")
AT_ONE = ("parallelism.dp=1", "optimizer.zero_stage=0", "model.dtype=float32")


@dataclass
class Measurement:
    """Seconds, of the first rank.

    Attributes:
        plain_block, saving_block: of all steps of a block.
        normal_step, saving_step: of one step; of a step with the copy to host memory that follows it.
        save: from the copy to the renamed folder, with nothing else going on.
        torch_save: of `torch.save` of the same values, flushed, one file a rank.
        nanotron_save: of nanotron's functions, flushed afterwards, of its own optimizer with moments of the same sizes.
        num_bytes: of the checkpoint.
    """

    plain_block: list[float] = field(default_factory=list)
    saving_block: list[float] = field(default_factory=list)
    normal_step: list[float] = field(default_factory=list)
    saving_step: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    torch_save: list[float] = field(default_factory=list)
    nanotron_save: list[float] = field(default_factory=list)
    num_bytes: int = 0


def start(recipe: Recipe) -> Any:
    """A rank's engine with its first weights, as in a run."""
    import torch
    import torch.distributed as torch_dist

    from launch.train.engine import TrainingEngine
    from model.build import initialize_weights
    from nanotron_recipes.topology import resolve_topology
    from parallel.process_groups import EngineContext, init_process_group

    device = torch.device("cpu")
    init_process_group(device)
    topology = resolve_topology(recipe, torch_dist.get_world_size())
    engine = TrainingEngine(recipe, topology, EngineContext(topology.dp, topology.pp, topology.tp, device))
    initialize_weights(engine.built)
    return engine


def measure(recipe: Recipe, folder: Path, rounds: int, interval: int) -> Measurement:
    """Called on both ranks."""
    import torch.distributed as torch_dist

    from launch.train.synthetic import synthetic_batch
    from parallel.checkpoint_saver import CheckpointSaver
    from parallel.checkpoint_writer import CheckpointInfo

    engine = start(recipe)
    saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context)
    batch = synthetic_batch(recipe, engine.topology, 1, engine.context.dp_rank)
    info = CheckpointInfo(folder / "1", {"step": 1})
    found = Measurement()

    def step() -> float:
        return seconds_of(lambda: engine.train_step(batch, 1e-4))

    def plain_block() -> None:
        found.normal_step += [step() for _ in range(interval)]

    def saving_block() -> None:
        found.saving_step.append(step() + seconds_of(lambda: saver.start(info)))
        for _ in range(interval - 1):
            step()
        saver.wait()

    def save_and_wait() -> None:
        saver.start(info)
        saver.wait()

    theirs = nanotron_optimizer(engine)
    for bucket in engine.built.buckets:
        bucket.gradients.zero_()
    theirs.step()  # makes its moments

    began = time.monotonic()
    for number in range(rounds + 1):
        if engine.context.rank == 0 and number:
            left = (time.monotonic() - began) / number * (rounds + 1 - number)
            print(f"round {number} of {rounds}, {left:.0f} s left", file=sys.stderr, flush=True)
        blocks = {"plain_block": plain_block, "saving_block": saving_block}
        for name in list(blocks) if number % 2 else list(blocks)[::-1]:
            torch_dist.barrier()
            getattr(found, name).append(seconds_of(blocks[name]))
        torch_dist.barrier()
        found.save.append(seconds_of(save_and_wait))
        torch_dist.barrier()
        found.torch_save.append(seconds_of(lambda: torch_save(engine, folder / f"plain-{engine.context.rank}.pt")))
        torch_dist.barrier()
        found.nanotron_save.append(seconds_of(lambda: nanotron_save(engine, theirs, folder / "nanotron")))
    found.num_bytes = saver.finished()[-1].num_bytes
    engine.context.destroy()
    del found.normal_step[:interval], found.saving_step[0]  # the first round does not count
    for values in (found.plain_block, found.saving_block, found.save, found.torch_save, found.nanotron_save):
        del values[0]
    return found


def torch_save(engine: Any, path: Path) -> None:
    """The same values, as most training scripts save them."""
    import os

    import torch
    import torch.distributed as torch_dist

    from parallel.checkpoint_tensors import writable_tensors

    parts = writable_tensors(engine.built.buckets, engine.optimizer, engine.context)
    # Boxes are views of long vectors, of which torch would write everything.
    values = {name: [box.values.clone() for box in part.boxes] for name, part in parts.items()}  # type: ignore[attr-defined]
    with path.open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    torch_dist.barrier()


def nanotron_save(engine: Any, optimizer: Any, folder: Path) -> None:
    """nanotron's format, whose files are flushed afterwards: it flushes nothing, and ours is on the disk."""
    import os

    import torch.distributed as torch_dist
    from nanotron.serialize.optimizer import save_optimizer
    from nanotron.serialize.weights import save_weights

    save_weights(engine.built.module, engine.context, folder)
    save_optimizer(optimizer, engine.context, folder)
    torch_dist.barrier()
    if engine.context.rank == 0:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    torch_dist.barrier()


def load(recipe: Recipe, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of verifying every file and of loading, called on every rank."""
    import torch.distributed as torch_dist

    from parallel.checkpoint import load_checkpoint
    from parallel.checkpoint_files import verify_checkpoint_files

    engine = start(recipe)
    share = (torch_dist.get_rank(), torch_dist.get_world_size())
    verifying, loading = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        assert not verify_checkpoint_files(folder, share=share)
        torch_dist.barrier()
        verifying.append(time.perf_counter() - began)
        loading.append(seconds_of(lambda: load_checkpoint(folder, engine.built.buckets, engine.optimizer)))
        torch_dist.barrier()
    engine.context.destroy()
    return verifying[1:], loading[1:]


def sections_of(shape: str, rounds: int, interval: int, folder: Path) -> list[Section]:
    """Both tables of a shape."""
    from model.arithmetic import num_parameters
    from parallel.rank_pool import RankPool

    name, overrides, split = SHAPES[shape]
    topologies = (AT_DP2, (*AT_MP2, f"parallelism.{split}=2"), AT_ONE)
    at_dp2, at_mp2, at_one = (load_recipe(name, [*overrides, *where]).recipe for where in topologies)
    with RankPool(2, timeout=timedelta(hours=1)) as pool:
        found: Measurement = pool.run(2, measure, at_dp2, folder, rounds, interval)[0]
        loads = {
            "load at the same topology": pool.run(2, load, at_dp2, folder / "1", min(rounds, 3))[0],
            f"load at {split} 2": pool.run(2, load, at_mp2, folder / "1", min(rounds, 3))[0],
            "load at one rank": pool.run(1, load, at_one, folder / "1", min(rounds, 3))[0],
        }
    normal = median(found.normal_step)
    cost = Section(
        title=f"{shape}: {num_parameters(at_dp2):,} parameters, {found.num_bytes / 1e6:,.1f} MB a checkpoint",
        columns=("what", "without", "with a save", "ratio"),
        rows=[
            ("the saving step, ms", f"{1e3 * normal:.1f}", f"{1e3 * median(found.saving_step):.1f}",
             spread([one / normal for one in found.saving_step])),
            (f"{interval} steps, s", f"{median(found.plain_block):.2f}", f"{median(found.saving_block):.2f}",
             spread(ratios(found.saving_block, found.plain_block))),
        ],
        notes=f"Median (smallest to largest) of {rounds} rounds. The second row waits for the save to be on disk.",
    )  # fmt: skip
    speed = [
        ("save: written, flushed, checksums, manifest", found.save),
        ("torch.save, flushed", found.torch_save),
        ("nanotron's format, flushed, without checksums", found.nanotron_save),
    ]
    speed += [(f"{name}, all files verified first", [sum(pair) for pair in zip(*times, strict=True)])
              for name, times in loads.items()]  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (what, f"{median(seconds):.3f}", f"{found.num_bytes / median(seconds) / 1e9:.2f}") for what, seconds in speed
    ]
    return [cost, Section(f"{shape}: to and from the disk", ("what", "seconds", "GB/s"), rows)]


def main() -> None:
    """Measure the shapes, print the tables, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="saves that count")
    parser.add_argument("--interval", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: tiny; may be repeated")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default: the temporary folder")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()
    sections, shapes = [], arguments.shape or ["tiny"]
    for shape in shapes:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            sections += sections_of(shape, arguments.rounds, arguments.interval, folder)
        finally:
            shutil.rmtree(folder)
    publish(f"checkpoint-{'-'.join(shapes)}", "What a checkpoint costs", sections, write=not arguments.dry)


if __name__ == "__main__":
    main()
