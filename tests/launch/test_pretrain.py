"""Whole runs in real processes: torchrun, gloo, files, signals. A launch takes seconds, so a test makes many claims."""

import gzip
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import TRAIN_STEPS, StartProcess, curve, pretrain_command, write_recipe

from launch.train.metrics import Metrics, read_metrics
from launch.train.prepare import RunRequest, prepare_run
from launch.train.run_folder import RunFolder
from launch.train.run_lock import HOLDER_FILE, holder_of
from nanotron_recipes.loading import load_recipe


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_file: Path, start_process: StartProcess) -> Metrics:
    """The records of a run that a user starts with torchrun, where folders are called like our packages."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("data", "model"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the working directory')\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "launch.train", "--", small_file, "--run", "by-hand"]
    code, out, err = start_process(command, folder).end()
    assert code == 0, err
    assert "runs/by-hand: dp 2 · pp 1 · tp 1 on cpu, float32" in out and "attention: " in out
    run = folder / "runs" / "by-hand"
    assert (run / "completed").is_file() and not (run / HOLDER_FILE).exists()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [8, 16, 24, 32, 40]
    return read_metrics(run / "metrics.jsonl")


def test_a_run_records_every_step_every_validation_and_its_start(undisturbed: Metrics) -> None:
    assert [record.step for record in undisturbed.steps] == list(range(1, TRAIN_STEPS + 1))
    losses = [record.loss for record in undisturbed.steps]
    assert all(loss is not None for loss in losses) and losses[-1] < losses[0] - 1  # type: ignore[operator]
    assert {record.stage for record in undisturbed.steps[:12]} == {"first"}
    assert {record.stage for record in undisturbed.steps[12:]} == {"second"}
    assert undisturbed.steps[-1].tokens == TRAIN_STEPS * 24 * 64
    validations = [event for event in undisturbed.events if event["event"] == "validation"]
    assert [event["step"] for event in validations] == [0, 20, 40]
    for source in ("words", "numbers"):
        assert validations[-1]["validation_loss"][source] < validations[0]["validation_loss"][source] - 1
    (begun,) = [event for event in undisturbed.events if event["event"] == "start"]
    (ended,) = [event for event in undisturbed.events if event["event"] == "end"]
    assert (ended["verdict"], ended["reason"]) == ("done", "every step is trained") and begun["time"] < ended["time"]
    assert begun["topology"]["dp"] == 2 and begun["topology"]["global_batch_size"] == 24


def test_after_kill_9_every_later_step_is_bit_identical(
    small_file: Path, undisturbed: Metrics, start_process: StartProcess, tmp_path: Path
) -> None:
    command = pretrain_command(small_file, "--run", "killed")
    run = tmp_path / "runs" / "killed"
    first = start_process([*command, "--gpus-per-node", "0"], tmp_path)
    first.wait_for_step(run / "metrics.jsonl", 10)
    while not (run / "checkpoints" / "8").is_dir():  # written in the background of the steps that follow
        time.sleep(0.002)
    ranks = first.ranks()
    assert len(ranks) == 2
    assert {rank.environ()["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {""}, "--gpus-per-node 0"
    for rank in ranks:
        rank.suspend()

    code, out, err = start_process(command, tmp_path).end()
    assert code == 2 and len(err.splitlines()) == 1
    holder = holder_of(run)
    assert holder is not None and holder.pid in [rank.pid for rank in ranks]
    assert err.startswith(f"error: runs/killed: process {holder.pid} on ") and "starting" not in out

    first.kill()
    before = read_metrics(run / "metrics.jsonl")
    assert 10 <= before.steps[-1].step < TRAIN_STEPS
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "")
    assert "runs/killed: goes on; starting 2 ranks" in out and f"resumed after step {saved}" in out
    after = read_metrics(run / "metrics.jsonl")
    assert curve(after.steps) == curve(undisturbed.steps)
    validations = [event for event in undisturbed.events if event["event"] == "validation"]
    assert [event for event in after.events if event["event"] == "validation"][-1] == validations[-1]
    assert not (run / HOLDER_FILE).exists()
    # Two launches trained the steps between: both have written them, and a reader sees one.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == TRAIN_STEPS + before.steps[-1].step - saved
    assert [event["step"] for event in after.events if event["event"] == "start"] == [1, saved + 1]


def test_stops_save_and_a_run_goes_on_at_another_topology(
    small_file: Path, undisturbed: Metrics, start_process: StartProcess, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "stopped"
    metrics_file = run / "metrics.jsonl"
    command = pretrain_command(small_file, "--run", "stopped")

    code, out, err = start_process([*command, "--stop-after", "5"], tmp_path).end()
    assert (code, err) == (0, "")
    assert "stopped after step 5 (--stop-after); saved in runs/stopped/checkpoints/5" in out
    assert out.splitlines()[-1].endswith("nanotron-recipes pretrain runs/stopped/recipe.yaml --run stopped")
    code, out, err = start_process([*command, "--stop-after", "4"], tmp_path).end()
    assert (code, err) == (0, "") and "step 5 is saved" in out and "starting" not in out

    second = start_process(command, tmp_path)
    second.wait_for_step(metrics_file, 9)
    second.send(signal.SIGINT)
    code, out, err = second.end()
    assert (code, err) == (0, "")
    interrupted = _stopped_after(out)
    assert 9 <= interrupted < TRAIN_STEPS
    assert out.splitlines()[-1].endswith("nanotron-recipes pretrain runs/stopped/recipe.yaml --run stopped")
    straight = {step: values for step, values in curve(undisturbed.steps).items() if step <= interrupted}
    assert curve(read_metrics(metrics_file).steps) == straight

    third = start_process([*command, "--set", "parallelism.pp=2"], tmp_path)
    third.wait_for_step(metrics_file, interrupted + 2)
    third.send(signal.SIGTERM)
    code, out, err = third.end()
    assert (code, err) == (0, "") and "dp 1 · pp 2 · tp 1" in out
    terminated = _stopped_after(out)

    # The learning rate has a decay of its own, so that a longer run is another future alone.
    longer = [*command, "--set", "parallelism.tp=2", "--set", f"tokens.train_steps={TRAIN_STEPS + 2}"]
    code, out, err = start_process(longer, tmp_path).end()
    assert (code, err) == (0, "") and "dp 1 · pp 1 · tp 2" in out
    change = f"after step {terminated}: tokens.train_steps: {TRAIN_STEPS} → {TRAIN_STEPS + 2}"
    assert f"changed: {change}\n" in out
    assert f"# change: {change}\n" in (run / "recipe.yaml").read_text()
    records = read_metrics(metrics_file).steps
    assert [record.step for record in records] == list(range(1, TRAIN_STEPS + 3))
    for record, expected in zip(records, undisturbed.steps, strict=False):
        assert record.lr == expected.lr
        assert record.loss == pytest.approx(expected.loss, abs=1e-5)
        assert record.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)

    code, out, err = start_process(longer, tmp_path).end()
    assert (code, err) == (0, "") and "runs/stopped is complete after step 42" in out


def _stopped_after(out: str) -> int:
    (line,) = [line for line in out.splitlines() if line.startswith("stopped after step ")]
    match = re.fullmatch(r"stopped after step (\d+) \(asked to stop\); saved in runs/stopped/checkpoints/\1", line)
    assert match is not None, line
    return int(match[1])


def test_another_model_is_another_run_in_bfloat16_with_trace_and_export(
    small_file: Path, small_mapping: dict[str, Any], start_process: StartProcess, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    other = prepare_run(RunRequest(load_recipe(str(small_file))))
    other.lock.release()
    assert other.folder.name == "small-1" and (other.folder.path / "recipe.yaml").is_file()

    small_mapping["model"]["dtype"] = "bfloat16"
    small_mapping["model"]["model_config"] |= {
        "tie_word_embeddings": False,
        "no_rope_layer": None,
        "max_position_embeddings": 128,
    }
    small_mapping["tokens"] |= {"train_steps": 8, "val_check_interval": -1}
    small_mapping["optimizer"]["learning_rate_scheduler"] |= {"lr_decay_starting_step": 4, "lr_decay_steps": 4}
    small_mapping["profiler"] = {"profiler_export_path": "trace"}
    small_mapping["checkpoints"] = {"checkpoint_interval": 100, "export_at_end": True, "save_initial_state": True}
    file = write_recipe(tmp_path / "small.yaml", small_mapping)
    code, out, err = start_process(pretrain_command(file), tmp_path).end()
    assert code == 0, err

    run = tmp_path / "runs" / "small-2"
    assert "on cpu, bfloat16" in out and "verified: logits" in out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0", "8"]
    records = read_metrics(run / "metrics.jsonl").steps
    assert len(records) == 8 and records[-1].loss < records[0].loss  # type: ignore[operator]
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    weights = (run / "export" / "model.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}
    assert "lm_head.weight" in header
    for rank in (0, 1):
        (trace,) = (run / "trace").glob(f"*-rank-{rank}.json.gz")
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    for link in ("latest", "latest-export"):
        assert (tmp_path / "runs" / link).resolve() == run

    following = prepare_run(RunRequest(load_recipe(str(file))))
    following.lock.release()
    assert (following.folder.name, following.state) == ("small-3", "new")
    named = prepare_run(RunRequest(load_recipe(str(file)), "small-2"))
    named.lock.release()
    assert isinstance(named.folder, RunFolder) and named.state == "complete"
