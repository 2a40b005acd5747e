"""A recipe that trains in seconds, and `nanotron-recipes pretrain` in processes of its own."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from processes import kill_all, running

from launch.train.metrics import StepRecord, read_metrics

TRAIN_STEPS = 40
REPOSITORY = Path(__file__).parents[2]
WORDS = ["the", "a", "red", "green", "blue", "stone", "river", "window", "bird", "tree", "sees", "finds", "over"]
WORDS += ["under", "and", "with", "of", "small", "old"]
COMMAND_LINE = "from launch.cli.main import main; main()"

SMALL: dict[str, Any] = {
    "general": {"project": "tests", "seed": 3, "cpu_ranks_per_node": 2},
    "model": {
        "dtype": "float32",
        "init_method": {"std": 0.15},
        "make_vocab_size_divisible_by": 2,
        "model_config": {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "no_rope_layer": 4,
            "tie_word_embeddings": True,
            "eos_token_id": 0,
            "pad_token_id": 9,
        },
    },
    "tokens": {
        "sequence_length": 64,
        "train_steps": TRAIN_STEPS,
        "global_batch_size": 24,
        "micro_batch_size": "auto",
        "val_check_interval": 20,
        "limit_val_batches": 1,
    },
    "optimizer": {
        "weight_decay_exclude_named_params": [".*token_embedding.*", ".*norm.*"],
        "learning_rate_scheduler": {
            "learning_rate": 5.0e-3,
            "lr_warmup_steps": 4,
            "lr_warmup_style": "linear",
            "lr_decay_starting_step": 30,
            "lr_decay_steps": 10,
            "lr_decay_style": "1-sqrt",
            "min_decay_lr": 0.0,
        },
    },
    "data_stages": [
        {
            "name": "first",
            "start_training_step": 1,
            "data": {"seed": 5, "dataset": {"dataset_folder": ["words", "numbers"], "dataset_weights": [0.7, 0.3]}},
        },
        {
            "name": "second",
            "start_training_step": 13,
            "data": {"seed": 5, "dataset": {"dataset_folder": ["words", "numbers"], "dataset_weights": [0.2, 0.8]}},
        },
    ],
    "tokenizer": {"train": {"vocab_size": 320}},
    "corpus": {
        "sources": [
            {"name": "words", "reader": "jsonl", "path": "text/words.jsonl"},
            {"name": "numbers", "reader": "jsonl", "path": "text/numbers.jsonl"},
        ],
    },
    "parallelism": {"dp": "auto", "tp_mode": "REDUCE_SCATTER", "tp_linear_async_communication": False},
    "checkpoints": {"checkpoint_interval": 8, "export_at_end": False},
}
"""48,000 parameters of every kind; two sources in two stages; paths are to be made absolute with `small_recipe`."""


def write_recipe(file: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML; returns its path."""
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def small_recipe(folder: Path) -> dict[str, Any]:
    """The small recipe with its text and corpus in `folder`, to be changed at will."""
    recipe: dict[str, Any] = json.loads(json.dumps(SMALL))
    recipe["corpus"]["path"] = str(folder / "corpus")
    for source in recipe["corpus"]["sources"]:
        source["path"] = str(folder / source["path"])
    return recipe


def write_text(folder: Path) -> None:
    """Write the text of both sources: sentences of few words, and rows of counted numbers."""
    generator = random.Random(7)
    (folder / "text").mkdir(parents=True)
    sentences = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) + "." for _ in range(1500)]
    starts = [generator.randint(1, 800) for _ in range(1500)]
    rows = [" ".join(str(start + step) for step in range(generator.randint(4, 30))) for start in starts]
    for name, texts in (("words", sentences), ("numbers", rows)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text" / f"{name}.jsonl").write_text(lines)


class Process:
    """A command in a process of its own, with everything that it starts."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, **variables: str) -> None:
        """Start `arguments` in `folder`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHON"))}
        self._process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=folder,
            env={**kept, "PYTHONPATH": str(REPOSITORY), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run, by their module."""
        return running(self._children(), "launch.train")

    def wait_for_step(self, metrics_file: Path, step: int) -> None:
        """Return as soon as the record of a step from `step` on is written; the run must not end before."""
        end = time.monotonic() + 120
        while not metrics_file.is_file() or all(record.step < step for record in read_metrics(metrics_file).steps):
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)

    def lines(self) -> Iterator[str]:
        """The lines of stdout, each as soon as it is written; what was taken here is not in the result of `end`."""
        assert self._process.stdout is not None
        yield from self._process.stdout

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Wait at most so long; the exit code, stdout and stderr."""
        out, err = self._process.communicate(timeout=seconds)
        return self._process.returncode, out, err

    def kill(self) -> None:
        """End the process and all that it started, as a kill -9 of each would."""
        kill_all([*self._children(), psutil.Process(self._process.pid)])
        self._process.communicate()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            self.kill()

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)


StartProcess = Callable[..., Process]
"""Start a process that does not outlive the tests; arguments as `Process`."""


def pretrain_command(*arguments: str | Path) -> list[str | Path]:
    """`nanotron-recipes pretrain` with these arguments, as this Python runs it."""
    return [sys.executable, "-P", "-c", COMMAND_LINE, "pretrain", *arguments]


def curve(records: Sequence[StepRecord]) -> dict[int, tuple[float | None, float | None, float]]:
    """Loss, gradient norm and learning rate by step, at full precision."""
    return {record.step: (record.loss, record.grad_norm, record.lr) for record in records}
