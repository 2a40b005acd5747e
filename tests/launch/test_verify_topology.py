"""`verify-topology`: healthy topologies agree, planted bugs do not, and a mistake is one line."""

import functools
import re
import sys
from pathlib import Path
from typing import Any

import parity_plants
import pytest
import torch
import typer
from small_pretraining import COMMAND_LINE, StartProcess

from launch.cli.main import main
from launch.cli.verify_topology import verify_topology
from launch.train.initial_shards import InitialShards, compare_initial_shards
from launch.train.parity import start_engine
from launch.train.synthetic import synthetic_batch
from launch.train.verify_topology import (
    Grid,
    OwnBatches,
    check_comparable,
    choose_batches,
    choose_grids,
    compare_grids,
)
from model.build import draw_rule
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.overrides import apply_overrides
from parallel.initialization import initialize
from parallel.rank_pool import RankPool


def test_the_command_trains_on_the_recipes_data_and_says_that_topologies_agree(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    arguments = ["verify-topology", small_file, "--topology", "pp=2,tp=2", "--steps", "2"]
    code, out, err = start_process([sys.executable, "-P", "-c", COMMAND_LINE, *arguments], tmp_path).end()
    assert (code, err) == (0, "")
    assert "small: 2 steps in float32 on the CPU at dp 1 · pp 1 · tp 1, dp 1 · pp 2 · tp 2 …" in out
    assert "data: the recipe's own\n" in out
    assert len(re.findall(r"^│ +[12] │ +\d\.\d{6} │", out, flags=re.MULTILINE)) == 2
    assert out.count("none start alike") == 2 and "all equal to the bit" in out
    assert "verdict: the same training" in out


def test_a_disagreement_ends_with_1_and_is_named(
    small_file: Path, pool: RankPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = functools.partial(compare_grids, pool=pool, plant=parity_plants.one_seed_for_all_tensor_ranks)
    monkeypatch.setattr("launch.train.verify_topology.compare_grids", planted)
    with pytest.raises(typer.Exit) as ended:
        verify_topology(str(small_file), topology=["tp=2"], steps=1)
    assert ended.value.exit_code == 1
    out = capsys.readouterr().out
    assert "verdict: not the same training" in out
    assert re.search(r"qkv_proj\.weight on rank 0 and \S+qkv_proj\.weight on rank 1 start equal", out)
    assert "losses differ by up to" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "dpp=2"], "expected a list such as dp=2,pp=1,tp=2, each once"),
        (["--topology", "tp=0"], "--topology tp=0: expected"),
        (["--topology", "tp=2,tp=2"], "each once"),
        (["--topology", "dp=1"], "is compared with itself"),
        (["--topology", "tp=3"], "error: dp 1 · pp 1 · tp 3: parallelism.tp: 3: does not divide"),
        (["--topology", "dp=5"], "expected a multiple of dp 5"),
        (["--set", "general.cpu_ranks_per_node=1"], "name a topology: --topology tp=2"),
        (["--set", "parallelism.context_parallel_size=2"], "context parallelism is not available yet"),
        (["--steps", "2000"], "--steps 2000: expected at most tokens.train_steps 1100"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanotron-recipes", "verify-topology", "tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_a_model_that_does_not_fit_is_refused_before_anything_starts() -> None:
    recipe = load_recipe("smollm3-3b").recipe
    with pytest.raises(UserError, match=r"dp 96 · pp 1 · tp 1: expected [\d.]+ GiB of free memory"):
        check_comparable(recipe, [Grid(dp=96)], 5)


def test_which_topologies_are_compared() -> None:
    recipe = load_recipe("tiny").recipe
    assert choose_grids(recipe, []) == [Grid(), Grid(dp=2)]
    assert choose_grids(recipe, ["pp=2, tp=2"]) == [Grid(), Grid(pp=2, tp=2)]
    assert choose_grids(recipe, ["dp=2", "tp=2", "pp=2"]) == [Grid(dp=2), Grid(tp=2), Grid(pp=2)]


def test_tokens_are_the_recipes_own_where_they_are_there(small_file: Path, tmp_path: Path) -> None:
    own, said = choose_batches(load_recipe(str(small_file)).recipe)
    assert isinstance(own, OwnBatches) and said == "the recipe's own"
    missing = load_recipe(str(small_file), [f"corpus.path={tmp_path / 'nothing'}"]).recipe
    batches, said = choose_batches(missing)
    assert batches is synthetic_batch and said.startswith("synthetic tokens (") and "no such folder" in said


def shards_drawn_with(mapping: dict[str, Any], how: str) -> InitialShards:
    """Called on every rank: the matrices of all layers start `how` they should not, on every stage."""
    engine = start_engine(mapping)
    own = draw_rule(engine.recipe)

    def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        values = own(name, shape, torch.Generator().manual_seed(7))
        return values if how == "equal" else values + own(name, shape, generator)

    initialize(engine.built.buckets, engine.recipe.general.seed, draw)
    found = compare_initial_shards(engine.built.buckets, engine.context)
    engine.context.destroy()
    return found


@pytest.mark.parametrize("how", ["equal", "correlated"])
def test_layers_that_start_alike_on_two_stages_are_named(
    how: str, pool: RankPool, small_recipe: dict[str, Any]
) -> None:
    small_recipe["model"]["init_method"]["scaling_method"] = "NONE"
    mapping, _ = apply_overrides(small_recipe, ["parallelism.pp=2"])
    first, second = pool.run(2, shards_drawn_with, mapping, how)
    assert first == second
    down = [line for line in first.related if "mlp.gate_up_proj" in line]
    assert len(down) == 6, "all pairs of four layers"
    assert any("on rank 0 and " in line and "on rank 1 start " + how in line for line in down)
