"""Keys of pairs.yaml."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from posttraining.datasets import DataSettings, check_prompts_alone
from posttraining.errors import mistake
from posttraining.generation import Backend
from posttraining.settings import StageSettings


@dataclass(kw_only=True)
class SideSettings:
    """How one of the two models answers."""

    temperature: float = 1.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Longest answer, in tokens; one that does not end within them is no candidate."""
    samples: int = 1
    """Answers drawn for each prompt; the first that passes the filters is taken."""
    backend: Backend = "auto"
    """auto: vLLM where it is installed and there is a GPU, else transformers."""
    dtype: str = "auto"
    """What the model computes in; auto: as its folder says."""
    batch_size: int = 128
    """Prompts answered at once by transformers; vLLM schedules by itself."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template: {enable_thinking: false}. They are the same for both models, since a pair has one
    prompt, and are written into its row."""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, key) < 1:
                raise mistake(None, key, getattr(self, key), "expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise mistake(None, "temperature", self.temperature, "expected a number from 0 on")


@dataclass(kw_only=True)
class FilterSettings:
    """Which answers may become a pair."""

    check: Literal["exact", "math", "none"] = "none"
    """With the column `answer` of the prompts: exact compares the last box after the thoughts, math lets math-verify do
    so; the chosen answer must be right, the rejected one wrong. none: nothing is verified."""
    format: bool = False
    """Whether the chosen answer must be one closed thought and an answer with one box."""
    min_tokens: int = 1
    """Fewest tokens of either answer."""
    max_tokens: int | None = None
    """Most tokens of either answer; null: as many as were generated."""
    max_length_ratio: float | None = None
    """Most tokens of the longer answer over those of the shorter one; null: any."""
    refusals: list[str] = field(
        default_factory=lambda: [
            r"^(i'm sorry|i am sorry|sorry),? but",
            r"\bi (cannot|can't|can not|am unable to|am not able to) (help|assist|provide|answer|do|comply)",
            r"\bas an ai\b",
        ]
    )
    """Regular expressions, whatever the case; an answer in which one is found, thoughts aside, is in no pair."""

    def __post_init__(self) -> None:
        for pattern in self.refusals:
            try:
                re.compile(pattern)
            except re.error as error:
                raise mistake(None, "refusals", pattern, f"no regular expression ({error})") from error


@dataclass(kw_only=True)
class PairsSettings(StageSettings):
    """Keys of pairs.yaml: `model` gives the chosen answers, `weak_model` the rejected ones."""

    weak_model: str
    """The folder of the weaker model."""
    data: DataSettings
    """Prompts: rows with `prompt` (text, or a conversation that ends with the user's turn), and `answer` if any."""
    held_out_prompts: int = 0
    """Prompts kept apart; their pairs go to held_out.jsonl. Held-out problems of a generated task, else last rows."""
    chosen: SideSettings = field(default_factory=SideSettings)
    """How `model` answers."""
    rejected: SideSettings = field(default_factory=SideSettings)
    """How `weak_model` answers."""
    filters: FilterSettings = field(default_factory=FilterSettings)
    """Which answers may become a pair."""
    seed: int = 0
    """Of sampling."""
    chunk: int = 512
    """Prompts between two files: what a killed run loses at most, and what nodes divide among themselves."""
    shards: int = 1
    """Processes, on any nodes with this folder in common, that share the work; the last to end writes the pairs."""
    shard: int = 0
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise mistake(None, "shard", self.shard, f"expected 0 … {self.shards - 1}")
        if self.chunk < 1:
            raise mistake(None, "chunk", self.chunk, "expected 1 or more")
        if self.held_out_prompts < 0:
            raise mistake(None, "held_out_prompts", self.held_out_prompts, "expected 0 or more")
        check_prompts_alone(self.data, "chosen.template")
        if self.rejected.template != self.chosen.template:
            expected = f"expected that of chosen, {self.chosen.template}: a pair has one prompt"
            raise mistake(None, "rejected.template", self.rejected.template, expected)
