"""Reinforcement learning from rewards that can be verified: TRL's GRPOTrainer, with alarms.

    posttraining grpo tiny --set model=runs/apo --set output_dir=runs/grpo

A model that is rewarded for right answers alone writes longer and longer ones; `soft_overlong_penalty` takes that back
and the alarms end a training that it happens to all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttraining.alarm_limits import AlarmLimits
from posttraining.datasets import DataSettings, as_conversations, check_prompts_alone, load_data
from posttraining.errors import NO_VALUE, StageFailed, mistake
from posttraining.guard import require_sft
from posttraining.model_folder import check_length, check_model_folder, load_model, load_tokenizer
from posttraining.next_line import free_folder, stage_command
from posttraining.prompt_length import check_prompts
from posttraining.rewards import RewardChoice, check_answers, columns_of, resolve
from posttraining.settings import StageSettings, load

STAGE = "grpo"


@dataclass(kw_only=True)
class GrpoSettings(StageSettings):
    """Keys of grpo.yaml beside those of TRL's GRPOConfig; its `reward_weights` are given with the rewards."""

    data: DataSettings
    """Rows with `prompt`, and the columns that the rewards have as parameters: `answer` for accuracy."""
    rewards: list[RewardChoice]
    """What answers are rewarded for: the weighted sum."""
    alarms: AlarmLimits = field(default_factory=AlarmLimits)
    """When the training is ended because answers only grow."""

    def __post_init__(self) -> None:
        check_prompts_alone(self.data, "chat_template_kwargs")


def run(config: str, overrides: Sequence[str] = (), force: str | None = None) -> str | None:
    """Train the config's `model` into its `output_dir`, or go on where a killed run was.

    Returns what to call next, in the main process. Raises Mistake; StageFailed where an alarm ended the training.
    """
    from trl import GRPOConfig

    from posttraining import training

    (settings, arguments), mapping = load(config, STAGE, (GrpoSettings, GRPOConfig), overrides)
    folder = check_model_folder(settings.model)
    check_length(folder, "max_completion_length", arguments.max_completion_length, config)
    if arguments.reward_weights is not None:
        raise mistake(config, "reward_weights", NO_VALUE, "expected as `weight` of each of the rewards")
    arguments.reward_weights = [choice.weight for choice in settings.rewards]
    rewards = resolve(settings.rewards, config)
    forced = require_sft(folder, STAGE, force)
    with training.begin(settings, arguments, STAGE, mapping, forced) as work:
        data = as_conversations(load_data(settings.data, "prompts", config, columns_of(rewards)))
        check_answers(rewards, data, config)
        tokens, kwargs = arguments.max_completion_length or 0, arguments.chat_template_kwargs
        check_prompts(folder, load_tokenizer(folder), data["prompt"], tokens, f"{config}: data", kwargs)
        trainer, tokenizer, alarms = build(settings, arguments, rewards, data, work.folder / "alarms.jsonl")
        training.train(trainer, work)
        if alarms.rung and settings.alarms.action == "stop":
            raise StageFailed(f"{alarms.rung[-1]}; its checkpoints are in {work.folder}")
        training.finish(trainer, work, tokenizer, data)
    if not trainer.is_world_process_zero():
        return None
    reward, length = (training.last_value(trainer, name) for name in ("reward", "completions/mean_length"))
    print(f"grpo: {trainer.state.global_step} steps, reward {reward}, mean length {length}, in {settings.output_dir}")
    keys = {"models": {STAGE: settings.output_dir}, "output_dir": free_folder(settings.output_dir, "grpo-scores")}
    return stage_command("evaluate", config, keys)


def build(
    settings: GrpoSettings, arguments: Any, rewards: list[Any], data: Any, alarm_file: Path
) -> tuple[Any, Any, Any]:
    """TRL's trainer, the tokenizer, and the alarms that watch it. `arguments`: a GRPOConfig."""
    from trl import GRPOTrainer

    from posttraining.alarms import LengthAlarms

    model = load_model(settings.model, **{"dtype": "auto", **(arguments.model_init_kwargs or {})})
    tokenizer = load_tokenizer(settings.model)
    arguments.model_init_kwargs = None  # they have been used
    alarms = LengthAlarms(settings.alarms, alarm_file)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[alarms],
    )
    return trainer, tokenizer, alarms
