"""The whole chain at the smallest size, a process for each stage, also killed in each of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import QUESTION, chat_rows, write_rows

from posttraining import lineage
from posttraining.evaluate.results import read_results
from posttraining.generation import Generator
from posttraining.report import scores_table

STAGES = ("sft", "pairs", "apo", "grpo", "merge", "scores")


def small_chain(folder: Path, base: Path) -> Path:
    """A pipeline's config: the tiny recipes with little data and few steps."""
    chats = str(write_rows(folder / "chats.jsonl", chat_rows(480)))
    rows = [{"prompt": f"{QUESTION}{number}", "answer": "5"} for number in range(24)]
    prompts = {"path": str(write_rows(folder / "prompts.jsonl", rows))}
    side = {"max_new_tokens": 60, "backend": "transformers", "batch_size": 12}
    pairs = {"path": "{pairs}/pairs.jsonl", "held_out_path": "{pairs}/held_out.jsonl"}
    task = {"data": prompts, "max_new_tokens": 50}
    sets: dict[str, dict[str, Any]] = {
        "sft": {"model": "{model}", "data": {"path": chats}, "learning_rate": 1e-2, "early_at": 0.6, "save_steps": 5},
        "pairs": {
            "model": "{sft}",
            "weak_model": "{sft}/early",
            "data": prompts,
            "held_out_prompts": 6,
            "chunk": 6,
            "chosen": {**side, "temperature": 0.7},
            "rejected": {**side, "temperature": 1.5},
            "filters": {"check": "none"},
        },
        "apo": {"model": "{sft}", "data": pairs, "per_device_train_batch_size": 2, "save_steps": 2},
        "grpo": {
            "model": "{apo}",
            "data": prompts,
            "per_device_train_batch_size": 8,
            "max_completion_length": 40,
            "max_steps": 16,
            "save_steps": 2,
        },
        "merge": {"models": [{"model": "{grpo}", "weight": 0.9}, {"model": "{sft}", "weight": 0.1}]},
        "scores": {
            "models": {name: "{" + name + "}" for name in ("sft", "apo", "grpo", "merge")},
            "tasks": [{"name": "greedy", **task}, {"name": "sampled", "temperature": 1.0, **task}],
        },
    }
    commands = {"apo": "prefer", "scores": "evaluate"}
    stages = [
        {"name": name, "command": commands.get(name, name), "recipe": "tiny", "set": sets[name]} for name in STAGES
    ]
    content = {"model": str(base), "output_dir": "chain", "seed": 1, "final": "merge", "stages": stages}
    file = folder / "pipeline.yaml"
    file.write_text(json.dumps(content))
    return file


def start(file: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "posttraining", "pipeline", str(file), "--set", f"output_dir={output}"]
    log = output.with_suffix(".log").open("a")
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, text=True)


def tables(output: Path) -> str:
    return scores_table(read_results(output / "scores"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The config, and the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("chain")
    file = small_chain(folder, base)
    process = start(file, folder / "whole")
    assert process.wait(timeout=280) == 0, (folder / "whole.log").read_text()
    return file, folder / "whole"


@pytest.mark.chain
def test_every_stage_leaves_what_the_report_and_the_lineage_tell(whole: tuple[Path, Path]) -> None:
    _, output = whole
    names = lineage.stage_names(output / "merge")
    assert names == ["pretrain", "sft", "prefer", "grpo", "merge"]
    report = (output / "report.md").read_text()
    assert tables(output) in report and "| apo |" in report
    assert {path.stem for path in (output / "plots").iterdir()} == {"sft", "apo", "grpo"}
    assert lineage.weights_sha256(output / "merge")[:16] in (output / "merge" / "README.md").read_text()


@pytest.mark.chain
@pytest.mark.parametrize("stage", ["sft", "sft/early", "apo", "grpo", "merge"])
def test_answers_of_every_stage_stop_at_the_end_of_a_turn(whole: tuple[Path, Path], stage: str) -> None:
    generator = Generator(str(whole[1] / stage), "transformers")
    stops = generator.model.generation_config.eos_token_id
    assert generator.tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    assert generator.tokenizer.pad_token_id not in stops
    if stage != "sft/early":
        question = [{"role": "user", "content": QUESTION}]
        (answer,) = generator([question], max_new_tokens=60, temperature=0, seed=0)
        assert answer.stopped and "<|im_end|>" not in answer.text


@pytest.mark.chain
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_weights_and_table(whole: tuple[Path, Path]) -> None:
    file, output = whole
    other = output.with_name("killed")
    for number, stage in enumerate(("sft", "pairs", "apo", "grpo", "scores"), 1):
        process = start(file, other)
        try:
            wait_until_within(stage, other, process)
            time.sleep(random.Random(number).uniform(0, 0.5))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    process = start(file, other)
    log = other.with_suffix(".log")
    assert process.wait(timeout=280) == 0, log.read_text()
    assert tables(other) == tables(output)
    for stage in ("sft", "apo", "grpo", "merge"):
        assert lineage.weights_sha256(other / stage) == lineage.weights_sha256(output / stage), stage
    assert "sft: goes on from step" in log.read_text() and "grpo: goes on from step" in log.read_text()


def wait_until_within(stage: str, output: Path, process: subprocess.Popen[str]) -> None:
    """Until a stage has something to lose: a checkpoint, or a file of answers."""
    work, deadline = output / f".{stage}.work", time.monotonic() + 200
    while not any(path.name.startswith("checkpoint-") or path.suffix == ".jsonl" for path in work.rglob("*")):
        assert process.poll() is None and time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.05)
