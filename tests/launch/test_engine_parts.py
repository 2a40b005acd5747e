"""Which parts of the installed nanotron really run in a 3D-parallel step."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from parity_cases import grid

from launch.train.parity import start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.overrides import apply_overrides
from parallel.adaptations import replacement_reason
from parallel.rank_pool import RankPool

PARTS = {
    "parallel.context.ParallelContext": "subclass",
    "parallel.pipeline_parallel.p2p.P2P": "subclass",
    "parallel.pipeline_parallel.block.PipelineBlock": "the wheel's own",
    "parallel.pipeline_parallel.engine.OneForwardOneBackwardPipelineEngine": "the wheel's own",
    "parallel.pipeline_parallel.engine.AllForwardAllBackwardPipelineEngine": "the wheel's own",
    "parallel.tensor_parallel.nn.TensorParallelEmbedding": "the wheel's own",
    "parallel.tensor_parallel.nn.TensorParallelColumnLinear": "the wheel's own",
    "parallel.tensor_parallel.nn.TensorParallelRowLinear": "subclass",
    "optim.zero.ZeroDistributedOptimizer": "replacement",
    "optim.clip_grads.clip_grad_norm": "replacement",
}

CODE_THAT_RUNS = {
    "parallel.context": "ParallelContext._init_parallel_groups",
    "parallel.pipeline_parallel.p2p": "P2P.recv_tensors",
    "parallel.pipeline_parallel.block": "PipelineBlock.forward",
    "parallel.pipeline_parallel.state": "PipelineTrainBatchState.run_communication",
    "parallel.tensor_parallel.nn": "TensorParallelRowLinear.forward",
    "parallel.tensor_parallel.functional": "column_linear",
    "parallel.tied_parameters": "create_pg_for_tied_weights",
}

NEVER_IMPORTED = ("flash_attn", "nanotron.trainer", "nanotron.models.llama", "nanotron.nn.layer_norm")


@dataclass
class Walk:
    """What one rank saw: the wheel's functions that were called, and which class stands for each part."""

    called: set[tuple[str, str]] = field(default_factory=set)
    classes: dict[str, str] = field(default_factory=dict)
    imported: list[str] = field(default_factory=list)


def walk_on_rank(mapping: dict[str, object]) -> Walk:
    import nanotron

    walk = Walk()
    executed: set[CodeType] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        executed.add(frame.f_code)

    sys.setprofile(record)
    engine = start_engine(mapping)
    engine.train_step(synthetic_batch(engine.recipe, engine.topology, 1, engine.context.dp_rank), 1e-3)
    sys.setprofile(None)
    home = Path(nanotron.__file__).parent
    for code in executed:
        file = Path(code.co_filename)
        if home in file.parents:
            walk.called.add((".".join(file.relative_to(home).with_suffix("").parts), code.co_qualname))

    running = [engine.context, engine._pipeline, engine.optimizer, engine.built.module.model.p2p]
    running += list(engine.built.module.modules())
    for cls in {type(thing) for thing in running}:
        for ancestor in cls.__mro__:
            name = f"{ancestor.__module__}.{ancestor.__qualname__}".removeprefix("nanotron.")
            if name in PARTS:
                walk.classes[name] = "the wheel's own" if ancestor is cls else "subclass"
    walk.imported = [name for name in NEVER_IMPORTED if name in sys.modules]
    engine.context.destroy()
    return walk


@pytest.fixture(scope="module")
def walks(rank_pool: RankPool, base_recipe: dict[str, Any]) -> list[Walk]:
    found = []
    for engine in ("1f1b", "afab"):
        overlay = (*grid(dp=2, pp=2, tp=2, zero=1, engine=engine, micro_batch=1), "tokens.global_batch_size=4")
        found += rank_pool.run(8, walk_on_rank, apply_overrides(base_recipe, overlay)[0])
    return found


def test_what_runs_is_the_wheels(pool: RankPool, walks: list[Walk]) -> None:
    report: dict[str, str] = {}
    for walk in walks:
        for name, verdict in walk.classes.items():
            assert report.setdefault(name, verdict) == verdict, f"{name} is not the same on all ranks"
    for name in PARTS:
        report.setdefault(name, "replacement")
    assert report == PARTS


def test_the_wheels_code_is_what_is_executed(pool: RankPool, walks: list[Walk]) -> None:
    called = set().union(*(walk.called for walk in walks))
    assert set(CODE_THAT_RUNS.items()) - called == set()
    engines = {name for module, name in called if module == "parallel.pipeline_parallel.engine"}
    assert {
        "OneForwardOneBackwardPipelineEngine.train_batch_iter",
        "AllForwardAllBackwardPipelineEngine.train_batch_iter",
    } <= engines


def test_what_is_replaced_does_not_run_and_has_a_reason(pool: RankPool, walks: list[Walk]) -> None:
    modules = {module for walk in walks for module, _ in walk.called}
    for name, verdict in PARTS.items():
        assert bool(replacement_reason(name)) == (verdict == "replacement"), name
        if verdict == "replacement":
            assert name.rsplit(".", 1)[0] not in modules


def test_modules_that_need_flash_attn_are_not_imported(pool: RankPool, walks: list[Walk]) -> None:
    assert [walk.imported for walk in walks] == [[]] * len(walks)
