"""Answers of both models in files of a chunk of prompts each: what a killed run, or another node, finds done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from posttraining.files import write_whole
from posttraining.generation import Answer, Generator
from posttraining.pairs.prompts import Prompt
from posttraining.pairs.settings import PairsSettings, SideSettings

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


def generate_missing(settings: PairsSettings, prompts: Sequence[Prompt], folder: Path) -> None:
    """Write this shard's files of answers that are not in `folder` yet, one model after the other."""
    for side in SIDES:
        numbers = range(settings.shard, _chunks(settings, prompts), settings.shards)
        missing = [number for number in numbers if not chunk_file(folder, side, number).is_file()]
        if missing:
            _generate(settings, prompts, folder, side, missing)


def is_complete(settings: PairsSettings, prompts: Sequence[Prompt], folder: Path) -> bool:
    """Whether the answers of every shard are there."""
    numbers = range(_chunks(settings, prompts))
    return all(chunk_file(folder, side, number).is_file() for side in SIDES for number in numbers)


def read_answers(settings: PairsSettings, prompts: Sequence[Prompt], folder: Path, side: Side) -> list[list[Answer]]:
    """One side's answers to every prompt, in the order of the prompts; `samples` of them each."""
    answers: list[list[Answer]] = []
    for number in range(_chunks(settings, prompts)):
        lines = chunk_file(folder, side, number).read_text(encoding="utf-8").splitlines()
        answers += [[Answer(**answer) for answer in json.loads(line)] for line in lines]
    assert len(answers) == len(prompts), f"{len(answers)} lines of answers to {len(prompts)} prompts"
    return answers


def chunk_file(folder: Path, side: Side, number: int) -> Path:
    """The file of one chunk's answers: a line for each prompt."""
    return folder / "answers" / f"{side}-{number:05d}.jsonl"


def side_settings(settings: PairsSettings, side: Side) -> tuple[str, SideSettings]:
    """The model's folder and how it answers."""
    return (settings.model, settings.chosen) if side == "chosen" else (settings.weak_model, settings.rejected)


def sample_seed(seed: int, side: Side, number: int, sample: int) -> int:
    """The seed of one sample of a chunk's answers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {side} {number} {sample}".encode()).digest()[:4], "big")


def _chunks(settings: PairsSettings, prompts: Sequence[Any]) -> int:
    return -(-len(prompts) // settings.chunk)


def _generate(
    settings: PairsSettings, prompts: Sequence[Prompt], folder: Path, side: Side, missing: Sequence[int]
) -> None:
    model, how = side_settings(settings, side)
    generator = Generator(model, how.backend, how.dtype, how.batch_size)
    started = time.monotonic()
    for done, number in enumerate(missing, 1):
        chunk = prompts[number * settings.chunk : (number + 1) * settings.chunk]
        samples = [
            generator(
                [prompt.turns for prompt in chunk],
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                seed=sample_seed(settings.seed, side, number, sample),
                template=how.template,
            )
            for sample in range(how.samples)
        ]
        lines = [json.dumps([asdict(answer) for answer in answers]) + "\n" for answers in zip(*samples, strict=True)]
        write_whole(chunk_file(folder, side, number), "".join(lines))
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f"pairs: {side} answers of {model}: chunk {done}/{len(missing)}  {left:.0f} s left", flush=True)
