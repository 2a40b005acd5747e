"""The pipeline: what it plans, runs, skips and refuses, and that a kill costs it only what was under way."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import write_chat

from posttraining import lineage, pipeline
from posttraining.cli import main
from posttraining.errors import Mistake, StageFailed
from posttraining.settings import RECIPES, load

MERGE: dict[str, Any] = {
    "name": "mix",
    "command": "merge",
    "recipe": "tiny",
    "set": {"method": "soup", "models": [{"model": "{model}"}, {"model": "{model}"}]},
}
TASK = {"name": "greedy", "data": {"generated": "arithmetic", "examples": 4}, "max_new_tokens": 3}
SCORES: dict[str, Any] = {
    "name": "scores",
    "command": "evaluate",
    "recipe": "tiny",
    "set": {"models": {"start": "{model}", "mix": "{mix}"}, "tasks": [TASK]},
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


def config(tmp_path: Path, model: Path, stages: list[dict[str, Any]], final: str = "mix") -> str:
    content = {"model": str(model), "output_dir": str(tmp_path / "out"), "seed": 5, "final": final, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(content))
    return str(tmp_path / "pipeline.yaml")


def planned(file: str) -> list[pipeline.Planned]:
    (settings,), _ = load(file, "pipeline", (pipeline.PipelineSettings,), ())
    return pipeline.plan(settings, file)


def test_the_shipped_pipeline_plans_every_stage_with_its_folders(chat: Path, tmp_path: Path) -> None:
    (settings,), _ = load("tiny", "pipeline", (pipeline.PipelineSettings,), [f"model={chat}", f"output_dir={tmp_path}"])
    stages = pipeline.plan(settings, "tiny")
    assert [one.stage.command for one in stages] == ["sft", "pairs", "prefer", "grpo", "merge", "evaluate"]
    words = {one.stage.name: one.overrides for one in stages}
    assert f"model={chat}" in words["sft"] and "seed=1" in words["sft"]
    assert f"weak_model={tmp_path / 'sft' / 'early'}" in words["pairs"]
    assert f"output_dir={tmp_path / 'merge'}" in words["merge"]
    assert not list(tmp_path.iterdir())


def test_a_value_may_name_several_stages_and_names_may_have_hyphens(chat: Path, tmp_path: Path) -> None:
    again = {
        **MERGE,
        "name": "mix-again",
        "set": {**MERGE["set"], "models": [{"model": "{mix}"}, {"model": "{model}"}]},
    }
    last = {**SCORES, "set": {**SCORES["set"], "models": {"start": "{model}", "end": "{mix-again}"}}}
    words = planned(config(tmp_path, chat, [MERGE, again, last]))[-1].overrides
    assert f"models={{start: {chat}, end: {tmp_path / 'out' / 'mix-again'}}}" in words


def test_every_stage_that_takes_a_seed_gets_the_pipelines(chat: Path, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = []
    for command in pipeline.COMMANDS:
        keys = yaml.safe_load((RECIPES / "tiny" / f"{command}.yaml").read_text())
        recipe = tmp_path / f"{command}.yaml"
        recipe.write_text(json.dumps({key: value for key, value in keys.items() if key != "seed"}))
        stages.append({"name": f"my-{command}", "command": command, "recipe": str(recipe)})
    stages.append({**stages[0], "name": "other", "set": {"seed": 9}})
    words = {one.stage.name: one.overrides for one in planned(config(tmp_path, chat, stages, "my-merge"))}
    seeds = {name: [word for word in those if word.startswith("seed=")] for name, those in words.items()}
    taken = {f"my-{command}": ["seed=5"] for command in ("sft", "pairs", "prefer", "grpo", "evaluate")}
    assert seeds == {**taken, "my-compare": [], "my-merge": [], "other": ["seed=9"]}


def test_a_fingerprint_follows_the_recipe_and_every_stage_before(chat: Path, tmp_path: Path) -> None:
    first = planned(config(tmp_path, chat, [MERGE, SCORES]))
    same = planned(config(tmp_path, chat, [MERGE, SCORES]))
    assert [one.fingerprint for one in first] == [one.fingerprint for one in same]
    other = {**MERGE, "set": {**MERGE["set"], "models": [{"model": "{model}"}] * 3}}
    changed = planned(config(tmp_path, chat, [other, SCORES]))
    assert [one.fingerprint == two.fingerprint for one, two in zip(first, changed, strict=True)] == [False, False]
    asked = {**SCORES, "set": {**SCORES["set"], "batch_size": 7}}
    changed = planned(config(tmp_path, chat, [MERGE, asked]))
    assert [one.fingerprint == two.fingerprint for one, two in zip(first, changed, strict=True)] == [True, False]


def test_stages_run_once_and_leave_a_report_and_a_card(
    chat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, chat, [MERGE, SCORES])
    command = pipeline.run(file)
    out = capfd.readouterr().out
    assert "[1/2] mix: posttraining merge tiny" in out and str(tmp_path / "out" / "mix") in command
    assert "next: " not in out, "a stage says nothing of what the pipeline does itself"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| mix | greedy | 4 |" in report and "| start → mix | greedy | +0.000" in report
    card = (tmp_path / "out" / "mix" / "README.md").read_text()
    assert card.startswith("---\n") and "| merge |" in card and "| mix | greedy | 4 |" in card
    assert lineage.matches_weights(tmp_path / "out" / "mix")
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]
    written = (tmp_path / "out" / "scores" / "results.json").stat().st_mtime_ns
    pipeline.run(file)
    out = capfd.readouterr().out
    assert "[1/2] mix: done before" in out and "[2/2] scores: done before" in out
    assert (tmp_path / "out" / "scores" / "results.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scores"] == scores
    other = config(tmp_path, chat, [{**MERGE, "set": {**MERGE["set"], "models": [{"model": "{model}"}] * 3}}, SCORES])
    with pytest.raises(Mistake, match="mix: was made with other settings"):
        pipeline.run(other)


def test_a_stage_that_fails_ends_the_pipeline_with_its_code(
    chat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, chat, [{**MERGE, "set": {**MERGE["set"], "method": "linear"}}])
    with pytest.raises(StageFailed, match="stage mix ended with exit code 2") as failed:
        pipeline.run(file)
    assert failed.value.exit_code == 2
    assert "adding up to 1" in capfd.readouterr().err


def test_the_launcher_starts_compare_too(chat: Path, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/launched\nexit 3\n')
    launcher.chmod(0o755)
    losses = {"name": "losses", "command": "compare", "recipe": "tiny"}
    with pytest.raises(StageFailed, match="stage losses ended with exit code 3"):
        pipeline.run(config(tmp_path, chat, [losses, MERGE]), [f"launcher=[{launcher}]"])
    launched = (tmp_path / "launched").read_text()
    assert launched.startswith("-m posttraining.pipeline_stage compare tiny --set output_dir=")


def test_two_pipelines_do_not_share_a_folder(chat: Path, tmp_path: Path) -> None:
    file = config(tmp_path, chat, [MERGE])
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match="another pipeline, or a stage that it left, is at work there"):
            pipeline.run(file)


GRPO: dict[str, Any] = {
    "name": "grpo",
    "command": "grpo",
    "recipe": "tiny",
    "set": {
        "model": "{mix}",
        "max_completion_length": 4,
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "save_steps": 5,
        "rewards": [
            {
                "path": "posttraining.rewards.soft_overlong_penalty",
                "arguments": {"max_completion_len": 4, "soft_punish_cache": 2},
            }
        ],
    },
}


def test_killed_within_a_stage_it_goes_on_from_the_last_checkpoint(chat: Path, tmp_path: Path) -> None:
    file = config(tmp_path, chat, [MERGE, GRPO], final="grpo")
    command = [sys.executable, "-m", "posttraining", "pipeline", file]
    work = tmp_path / "out" / ".grpo.work"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not any(work.glob("checkpoint-*/trainer_state.json")):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (tmp_path / "out" / "grpo").exists()
    mixed = (tmp_path / "out" / "mix" / "model.safetensors").stat().st_mtime_ns
    stopped_at = max(int(folder.name.partition("-")[2]) for folder in work.glob("checkpoint-*"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "[1/2] mix: done before" in again.stdout
    assert f"grpo: goes on from step {stopped_at}" in again.stdout
    assert (tmp_path / "out" / "mix" / "model.safetensors").stat().st_mtime_ns == mixed
    assert lineage.stage_names(tmp_path / "out" / "grpo")[-1] == "grpo"


@pytest.mark.parametrize(
    ("stages", "final", "message"),
    [
        (
            [{**MERGE, "command": "marge"}],
            "mix",
            "stages: mix: command: 'marge': expected one of .* did you mean merge",
        ),
        ([MERGE, MERGE], "mix", "stages.name: 'mix': stands twice"),
        ([{**MERGE, "name": "model"}], "model", "stages.name: 'model'"),
        ([MERGE], "mixed", "final: 'mixed': expected a stage that leaves a model: mix; did you mean mix"),
        ([MERGE, SCORES], "scores", "final: 'scores': expected a stage that leaves a model: mix"),
        ([SCORES, MERGE], "mix", "'{mix}': expected a stage before this one: model"),
        ([{**MERGE, "recipe": "tinny"}], "mix", "'tinny': no such recipe of the stage merge"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(
    chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stages: list[dict[str, Any]],
    final: str,
    message: str,
) -> None:
    with pytest.raises(Mistake, match=message):
        pipeline.run(config(tmp_path, chat, stages, final))
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", config(tmp_path, chat, stages, final)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
