"""SFT on a model of a few thousand parameters: what is learnt, kept, resumed and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWER, QUESTION, chat_rows, overrides, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig

from posttraining import lineage, sft
from posttraining.datasets import data_fingerprint, load_data
from posttraining.generation import generate
from posttraining.model_folder import load_model, load_tokenizer
from posttraining.settings import load
from posttraining.training import METRICS

PROMPT = [{"role": "user", "content": QUESTION}]


def keys(base: Path, tmp_path: Path, rows: int = 16, **more: Any) -> dict[str, Any]:
    """Eight steps of two rows, a checkpoint every third."""
    file = write_rows(tmp_path / "rows.jsonl", chat_rows(rows))
    return {
        "model": str(base),
        "output_dir": str(tmp_path / "out"),
        "data": {"path": str(file)},
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "logging_steps": 1,
        **more,
    }


def test_a_taught_model_answers_and_ends_its_turn(taught: Path) -> None:
    model, tokenizer = load_model(taught), load_tokenizer(taught)
    (answer,) = generate(model, tokenizer, [PROMPT], max_new_tokens=60, temperature=0, seed=0)
    assert (answer.text, answer.stopped) == (ANSWER, True)


def test_the_folder_is_what_plain_transformers_needs(taught: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == ANSWER + "<|im_end|>"
    settings = json.loads((taught / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in settings["eos_token_id"]
    assert settings["pad_token_id"] not in settings["eos_token_id"]
    assert not (taught / "training_args.bin").exists()


def test_the_early_folder_is_a_weaker_model_of_the_same_run(taught: Path) -> None:
    early = taught / "early"
    first, last = load_file(early / "model.safetensors"), load_file(taught / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert lineage.matches_weights(early)
    stages = lineage.read(early)
    assert stages is not None
    assert stages[-1]["config"]["kept_at_step"] == 6
    (answer,) = generate(load_model(early), load_tokenizer(early), [PROMPT], max_new_tokens=60, temperature=0, seed=0)
    assert answer.text != ANSWER


def test_the_lineage_has_what_was_trained_on(taught: Path, base: Path) -> None:
    stages = lineage.read(taught)
    assert stages is not None
    assert [stage["stage"] for stage in stages] == ["pretrain", "sft"]
    assert stages[1]["parent"] == lineage.weights_sha256(base)
    assert stages[1]["data_fingerprint"] == data_fingerprint(chat_rows(960))
    assert stages[1]["config"]["learning_rate"] == 1e-2
    assert stages[1]["config"]["num_train_epochs"] == 1, "keys of the file are there too"


def test_every_logged_step_is_in_the_metrics(taught: Path) -> None:
    records = [json.loads(line) for line in (taught / METRICS).read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert [record["step"] for record in records if "loss" in record] == [20, 40, 60]
    assert losses[-1] < losses[0] / 4


class Killed(Exception):
    """Ends a training as a kill does: nothing is cleaned up."""


class KillAt(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise Killed


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    words = keys(base, tmp_path, early_at=0.5)
    sft.run("tiny", overrides({**words, "output_dir": str(whole / "out")}))
    build = sft.build

    def build_killed(*arguments: Any) -> Any:
        trainer, tokenizer = build(*arguments)
        trainer.add_callback(KillAt(5))
        return trainer, tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "build", build_killed)
        with pytest.raises(Killed):
            sft.run("tiny", overrides(words))
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    sft.run("tiny", overrides(words))
    assert "sft: goes on from step 3" in capsys.readouterr().out
    for name in ("model.safetensors", "early/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    assert list(tmp_path.glob(".*")) == [], "the work folder is gone"


def test_a_process_that_was_killed_leaves_no_folder_and_the_next_one_ends(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = keys(base, tmp_path, rows=600, save_steps=10)
    command = [sys.executable, "-m", "posttraining", "sft", "tiny"]
    command += [word for text in overrides(words) for word in ("--set", text)]
    work = tmp_path / ".out.work"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(work.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished work with other settings"):
        sft.run("tiny", overrides({**words, "max_steps": 12}))
    sft.run("tiny", overrides(words))
    assert "sft: goes on from step " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / METRICS).read_text().splitlines()[-1])["step"] == 300
    assert not work.exists()


def test_packed_rows_have_the_logits_of_each_row_alone(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [*PROMPT, {"role": "assistant", "content": "5" * length}]} for length in (3, 9, 20)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = {"model": str(base), "output_dir": str(tmp_path / "out"), "data": {"path": str(file)}, "packing": True}
    (settings, arguments), _ = load("tiny", "sft", (sft.SftSettings, SFTConfig), overrides(words))
    trainer, _ = sft.build(settings, arguments, load_data(settings.data, "chats"))
    (packed,) = trainer.train_dataset
    batch = trainer.data_collator([packed])
    starts = [place for place, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    assert len(starts) == 3
    with torch.no_grad():
        together = trainer.model.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = trainer.model(input_ids=batch["input_ids"][:, start:end]).logits[0]
            assert (together[start:end] - alone).abs().max() < 1e-5
        # Without the positions the rows do see each other, so the comparison can fail.
        mixed = trainer.model(input_ids=batch["input_ids"]).logits[0]
        assert (mixed[starts[1] :] - together[starts[1] :]).abs().max() > 1e-3
