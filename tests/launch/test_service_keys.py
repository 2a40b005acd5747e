"""Keys of `logging` and `profiler` have the effect that they name."""

import gzip
import json
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step_line import record

from launch.train import rank
from launch.train.callbacks import make_callbacks
from launch.train.loop import Launch
from launch.train.run_folder import RunFolder
from launch.train.signals import StopRequest
from launch.train.step_line import StepLine
from launch.train.tracing import StepTracer
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.schema.services import Profiler
from parallel.checkpoint_disks import Disks

TRACED = {"record_shapes": "Input Dims", "profile_memory": "[memory]", "with_stack": "python_function"}
"""What a trace has where the key is true."""


@pytest.mark.parametrize(("of_rank", "level"), [(0, logging.ERROR), (1, logging.DEBUG)])
def test_the_first_rank_and_the_others_log_what_the_recipe_says(
    of_rank: int, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("nanotron")
    monkeypatch.setattr(logger, "level", logger.level)

    class FarEnough(Exception):
        pass

    def stop_here(*_: object) -> None:
        raise FarEnough

    monkeypatch.setattr(rank, "open_same_data", stop_here)
    monkeypatch.setattr(rank.torch_dist, "get_rank", lambda: of_rank)
    for levels, expected in ((("error", "debug"), level), (("passive", "passive"), level)):
        settings = [f"logging.log_level={levels[0]}", f"logging.log_level_replica={levels[1]}"]
        recipe = load_recipe("tiny", settings).recipe
        folder, arguments = RunFolder.of(tmp_path, "a", recipe), Namespace(node_name="here")
        with pytest.raises(FarEnough):
            rank._train_run(folder, recipe, torch.device("cpu"), arguments, StopRequest(), "test")
        assert logger.level == expected, "passive leaves it as it is"


def test_a_log_has_a_line_every_so_many_steps_as_the_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("tiny", ["logging.iteration_step_info_interval=7"]).recipe
    folder = RunFolder.of(tmp_path, "a", recipe)
    folder.create()
    launch = Launch(folder, recipe, None, 1, None, None, {}, Disks((0,), ("here",), 0))  # type: ignore[arg-type]
    callbacks = make_callbacks(launch, StopRequest(), is_job=False)
    (line,) = [callback for callback in callbacks if isinstance(callback, StepLine)]
    for step in range(1, 25):
        line.on_step(replace(record(step), step_seconds=6.0))
    for callback in callbacks:
        callback.close()
    printed = [int(text.split()[1].split("/")[0]) for text in capsys.readouterr().out.splitlines()]
    assert printed == [1, 8, 15, 22, 24], "and where it ends"


@pytest.mark.parametrize("key", TRACED)
def test_a_trace_has_what_the_recipe_asks_for(key: str, tmp_path: Path) -> None:
    def traced(name: str, **keys: bool) -> str:
        others: dict[str, Any] = dict.fromkeys(TRACED, False)
        section = Profiler(profiler_export_path=name, skip_first=0, wait=0, warmup=1, **(others | keys))
        tracer = StepTracer(tmp_path, section, first_step=1, rank=0)
        for _ in range(2):
            torch.ones(8, 8) @ torch.ones(8, 8)
            tracer.step()
        tracer.close()
        (file,) = (tmp_path / name).iterdir()
        return json.dumps(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])

    assert TRACED[key] in traced("with", **{key: True})
    assert TRACED[key] not in traced("without")
