"""Mistakes anywhere in a pipeline's config are found before its first stage runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_pipeline import GRPO, MERGE, SCORES, config
from tiny_model import write_chat

from posttraining import pipeline
from posttraining.errors import Mistake, StageFailed


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


def changed(stage: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**stage, "set": {**stage["set"], **keys}}


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (changed(GRPO, lerning_rate=1), "tiny`: set: lerning_rate: unknown key; did you mean learning_rate"),
        (changed(GRPO, max_steps="many"), "max_steps: 'many': expected a whole number"),
        (changed(GRPO, rewards=[{"path": "no.such"}]), "set: rewards.0.path: 'no.such': does not import"),
        (changed(SCORES, batch_size="big"), "batch_size: 'big': expected a whole number"),
        (changed(SCORES, models={"mix": "{mix"}), "a brace is missing; expected {mix}"),
        (changed(SCORES, models={"mix": "mix}"}), "a brace is missing; expected {mix}"),
        (changed(SCORES, output_dir="there"), "scores: set.output_dir: 'there': the pipeline gives every stage"),
    ],
)
def test_a_later_stage_that_cannot_be_read_ends_it_before_the_first(
    later: dict[str, Any], said: str, chat: Path, tmp_path: Path
) -> None:
    with pytest.raises(Mistake) as refused:
        pipeline.run(config(tmp_path, chat, [MERGE, later]))
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_within_the_models_and_one_below_a_file_are_refused(chat: Path, tmp_path: Path) -> None:
    file = config(tmp_path, chat, [MERGE])
    for output in (chat, chat / "out"):
        with pytest.raises(Mistake, match=r"output_dir: .*: lies in the model's folder"):
            pipeline.run(file, [f"output_dir={output}"])
    with pytest.raises(Mistake, match=r"output_dir: .*pipeline.yaml is a file; expected a folder"):
        pipeline.run(file, [f"output_dir={file}/out"])


def test_a_stage_that_is_refused_does_not_say_that_the_same_command_goes_on(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="ended with exit code 2; mend what it says above and start again"):
        pipeline.run(config(tmp_path, chat, [changed(MERGE, method="linear")]))
