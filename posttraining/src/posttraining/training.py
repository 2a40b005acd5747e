"""What the stages that train with TRL have in common: a work folder to resume from, a finished folder at the end."""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from posttraining import lineage
from posttraining.datasets import data_fingerprint
from posttraining.errors import StageFailed, mistake
from posttraining.files import check_apart, own_work_folder, publish, work_folder, write_whole
from posttraining.limits import check_evaluation, check_packages
from posttraining.model_folder import find_not_finite, save_tokenizer_and_configs
from posttraining.resume_warnings import harmless_left_out
from posttraining.settings import StageSettings

METRICS = "metrics.jsonl"
"""One JSON object for each logged step, with TRL's names."""
EARLY = "early"
"""The folder, inside a stage's own, with the weights of an earlier step."""


_SHOWN = (
    "loss",
    "learning_rate",
    "mean_token_accuracy",
    "rewards/margins",
    "reward",
    "completions/mean_length",
    "eval_loss",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
)
"""Metrics that are in the line of a logged step, where the trainer has them."""

_SECONDS_A_LINE = 2.0
"""At least so many between two lines of logged steps."""


@dataclass(frozen=True)
class Work:
    """A stage under way: the folder that it trains in, beside the one that it will leave."""

    folder: Path
    """`.<name>.work`: the trainer's checkpoints, from which a killed stage goes on."""
    output: Path
    """Where the stage's folder will be."""
    parent: Path
    """The model's folder that the stage starts from."""
    stage: str
    """The stage's name in the lineage."""
    config: Mapping[str, Any]
    """The stage's keys, as its file and --set say them."""
    forced: str | None = None
    """The reason given to the guard, where it would have refused `parent`."""


@contextmanager
def begin(
    settings: StageSettings, arguments: TrainingArguments, stage: str, config: Mapping[str, Any], forced: str | None
) -> Iterator[Work]:
    """Make or find the stage's work folder, lock it until the block ends, and let the trainer write there; set the
    threads of a CPU.

    Raises Mistake where `output_dir` is taken, cannot be made, is in the model's folder, is being written by another
    process, or holds an unfinished training with other settings.
    """
    check_packages(arguments)
    check_evaluation(arguments, settings)
    quiet(settings.cpu_threads)
    parent = Path(settings.model)
    lineage.read(parent)  # what a stage's end needs, so that it is not found damaged only then
    content = {"stage": stage, "config": config, "parent": lineage.weights_sha256(parent)}
    output = Path(settings.output_dir)
    check_apart(output, parent)
    with shared_work_folder(arguments, output, content) as folder:
        arguments.output_dir = str(folder)
        yield Work(folder, output, parent, stage, config, forced)


@contextmanager
def shared_work_folder(arguments: TrainingArguments, output: Path, content: Mapping[str, Any]) -> Iterator[Path]:
    """`own_work_folder` for all processes of one training: the main one makes and locks it, the others wait for that.

    Raises Mistake as `own_work_folder` does.
    """
    with ExitStack() as held:
        with arguments.main_process_first(local=False, desc="work folder"):
            if arguments.process_index == 0:
                folder = held.enter_context(own_work_folder(output, content))
            else:
                folder = work_folder(output, content)
        yield folder


def quiet(cpu_threads: int | None) -> None:
    """Set the threads of a CPU (None: leave them) and leave the progress to the stages' own lines."""
    import datasets
    import torch
    from transformers.utils import logging

    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def train(trainer: Any, work: Work, early_at: float | None = None) -> None:
    """Train, from the last checkpoint in the work folder where there is one.

    `early_at`: the share of the steps after which the weights are kept as a folder of their own, `early`. Raises
    Mistake where the tokenizer pads with its eos: generation, which stops at no pad, would not end answers.
    """
    tokenizer = trainer.processing_class
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise mistake(work.parent, "pad_token", tokenizer.pad_token, "is its eos_token too; expected another")
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Lines(work.stage))
    trainer.add_callback(_EndDiverged(work))
    if early_at is not None:
        trainer.add_callback(_KeepEarly(trainer, work, early_at))
    checkpoint = last_whole_checkpoint(work.folder)
    if checkpoint:
        print(f"{work.stage}: goes on from step {checkpoint.name.rpartition('-')[2]}", flush=True)
    with harmless_left_out(tied=bool(getattr(trainer.model.config, "tie_word_embeddings", False))):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end (the trainer writes its own state last) and whose files can be
    read; None without any. One that is damaged is named in a line."""
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            whole[int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))["global_step"])] = checkpoint
        except (OSError, ValueError, LookupError):
            continue
    for step in sorted(whole, reverse=True):
        damaged = _damaged_file(whole[step])
        if damaged is None:
            return whole[step]
        earlier = any(other < step for other in whole)
        print(
            f"{damaged}: damaged; {'tries the checkpoint before' if earlier else 'starts from the beginning'}",
            flush=True,
        )
    return None


def _damaged_file(checkpoint: Path) -> Path | None:
    """The first file of weights or of the optimizer that is not what its ending says; None where all are."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    continue
            if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
                return file
        except (OSError, SafetensorError):
            return file
    return None


def finish(trainer: Any, work: Work, tokenizer: Any, data: Any, extra: Mapping[str, str] | None = None) -> None:
    """Write the stage's folder: model, tokenizer, metrics, lineage (with `data`'s fingerprint); drop the work folder.

    `extra`: text of further files by their names.
    """
    folder = work.folder / "model"
    trainer.save_model(str(folder))  # every rank: sharded weights are gathered
    if trainer.is_world_process_zero():
        fingerprint = data_fingerprint(data)
        _complete(trainer, work, tokenizer, folder, {}, fingerprint)
        lines = [json.dumps(record) + "\n" for record in trainer.state.log_history]
        write_whole(folder / METRICS, "".join(lines))
        for name, text in (extra or {}).items():
            write_whole(folder / name, text)
        early = work.folder / EARLY
        if early.is_dir():
            _complete(trainer, work, tokenizer, early, {"kept_at_step": _step_of(early)}, fingerprint)
            shutil.rmtree(folder / EARLY, ignore_errors=True)  # of a finish that was killed before it published
            early.rename(folder / EARLY)
        (folder / EARLY / _STEP).unlink(missing_ok=True)  # of no use once the folder is in its place
        publish(folder, work.output)
        shutil.rmtree(work.folder, ignore_errors=True)  # NFS keeps the lock while it is held
    trainer.accelerator.wait_for_everyone()


def last_value(trainer: Any, name: str) -> float | None:
    """The last value of a metric that the trainer logged; None where it logged none."""
    values = [record[name] for record in trainer.state.log_history if name in record]
    return float(values[-1]) if values else None


def _complete(
    trainer: Any, work: Work, tokenizer: Any, folder: Path, note: Mapping[str, Any], fingerprint: str
) -> None:
    """Bring a folder that the trainer saved into the form in which stages pass models on."""
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
    save_tokenizer_and_configs(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder)
    _check_finite(folder, work)
    config = {**work.config, **note}
    lineage.append(folder, work.parent, work.stage, config, fingerprint, forced=work.forced)


def _check_finite(folder: Path, work: Work) -> None:
    """Raise StageFailed where a weight of the folder is infinite or not a number: no such model is passed on."""
    found = find_not_finite(folder)
    if found is not None:
        raise _diverged(work, f"the tensor {found[1]} holds values that are not finite")


def _diverged(work: Work, sign: str) -> StageFailed:
    mend = f"move {work.folder} away and start again, for example with a lower learning_rate"
    return StageFailed(f"{work.stage}: the training diverged: {sign}; {mend}")


class _EndDiverged(TrainerCallback):
    """Ends a training at the first logged gradient that is no number: every weight is none after it."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        # With fp16 the scaler leaves such a step out and goes on.
        norm = (logs or {}).get("grad_norm")
        if norm is not None and not math.isfinite(norm) and not args.fp16:
            raise _diverged(self._work, f"the gradient of step {state.global_step} is not finite")


class _Lines(TrainerCallback):
    """A line for a logged step, with the seconds left: the same in a terminal and in a job's log. Of steps that follow
    each other faster than anyone reads, one every few seconds, every evaluation, and the last."""

    def __init__(self, stage: str) -> None:
        self._stage, self._started, self._first, self._said = stage, 0.0, 0, -math.inf

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        now, last = time.monotonic(), state.global_step == state.max_steps
        if now - self._said < _SECONDS_A_LINE and not last and not any(name.startswith("eval_") for name in logs):
            return
        self._said, done = now, state.global_step - self._first
        left = (now - self._started) / max(1, done) * (state.max_steps - state.global_step)
        shown = [f"{name} {logs[name]:.4g}" for name in _SHOWN if name in logs]
        step = f"{self._stage}: step {state.global_step}/{state.max_steps}"
        print("  ".join([step, *shown, f"{left:.0f} s left"]), flush=True)


class EvaluateLast(TrainerCallback):
    """Evaluates after the last step."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


_STEP = "step.json"


def _step_of(folder: Path) -> int:
    return int(json.loads((folder / _STEP).read_text(encoding="utf-8")))


class _KeepEarly(TrainerCallback):
    """Saves the weights once, after a share of the steps; before any later checkpoint, so that no restart misses it."""

    def __init__(self, trainer: Any, work: Work, share: float) -> None:
        self._trainer, self._work, self._share = trainer, work, share

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step != max(1, round(self._share * state.max_steps)):
            return
        part, early = self._work.folder / f".{EARLY}.part", self._work.folder / EARLY
        self._trainer.save_model(str(part))
        if state.is_world_process_zero:
            write_whole(part / _STEP, json.dumps(state.global_step))
            shutil.rmtree(early, ignore_errors=True)
            publish(part, early)
