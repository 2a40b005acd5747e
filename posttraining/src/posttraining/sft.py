"""Supervised fine-tuning and mid-training: TRL's SFTTrainer on conversations in the chat template.

    posttraining sft tiny --set model=runs/latest-export/export --set output_dir=runs/sft

What is learnt is the assistant's turns: headers, user turns, tool results and the system message are masked
(`assistant_only_loss`). With `packing: true` several conversations share a row; their positions keep attention apart.
The loss on the rows of `data.held_out_path` is measured after the last step, with `eval_on_start: true`
also before the first, and whenever `eval_strategy` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttraining.chat import prepare_tokenizer, template_mistakes
from posttraining.datasets import DataSettings, load_data, load_held_out
from posttraining.errors import NO_VALUE, mistake
from posttraining.model_folder import check_length, check_model_folder, load_model, load_tokenizer
from posttraining.next_line import free_folder, stage_command
from posttraining.rendering import check_rows, use_template
from posttraining.settings import StageSettings, load

STAGE = "sft"


@dataclass(kw_only=True)
class SftSettings(StageSettings):
    """Keys of sft.yaml beside those of TRL's SFTConfig."""

    data: DataSettings
    """Conversations: rows with `messages`; also `tools` and `chat_template_kwargs` where they have any. Those of
    `data.held_out_path` are evaluated on."""
    stage: str = STAGE
    """The stage's name in the lineage: sft, or mid for mid-training, after which prefer and grpo are still refused."""
    early_at: float | None = None
    """Share of the steps, between 0 and 1, after which the weights are kept in the folder `early`: a weaker model of
    the same make, for preference pairs. null: none are kept."""
    system_prompts: bool = True
    """Whether every system message has to be in what the model sees: preview looks at all rows, training at up to 1,000
    that are spread over the data."""

    def __post_init__(self) -> None:
        if self.early_at is not None and not 0 < self.early_at < 1:
            raise mistake(None, "early_at", self.early_at, "expected a share between 0 and 1")
        if self.stage not in (STAGE, "mid"):
            raise mistake(None, "stage", self.stage, "expected sft or mid")


def run(config: str, overrides: Sequence[str] = ()) -> str | None:
    """Fine-tune the config's `model` into its `output_dir`, or go on where a killed run was. Returns what to call next,
    in the main process. Raises Mistake."""
    from trl import SFTConfig

    from posttraining import training

    (settings, arguments), mapping = load(config, STAGE, (SftSettings, SFTConfig), overrides)
    folder = check_model_folder(settings.model)
    check_length(folder, "max_length", arguments.max_length, config)
    with training.begin(settings, arguments, settings.stage, mapping, None) as work:
        data = load_data(settings.data, "chats", config)
        _check_rows(settings, arguments, data, config)
        trainer, tokenizer = build(settings, arguments, data, load_held_out(settings.data, "chats", config))
        training.train(trainer, work, settings.early_at)
        training.finish(trainer, work, tokenizer, data)
    if not trainer.is_world_process_zero():
        return None
    # Fewer steps than logging_steps log no loss but the mean of all of them.
    losses = (training.last_value(trainer, name) for name in ("loss", "train_loss"))
    loss = next((f"{value:.3f}" for value in losses if value is not None), "n/a")
    held_out = training.last_value(trainer, "eval_loss")
    shown = f"loss {loss}" if held_out is None else f"loss {loss}, held-out loss {held_out:.3f}"
    print(f"{settings.stage}: {trainer.state.global_step} steps, {shown}, in {settings.output_dir}")
    return _next(settings, config)


def _check_rows(settings: SftSettings, arguments: Any, data: Any, config: str) -> None:
    tokenizer = load_tokenizer(settings.model)
    use_template(tokenizer, arguments.chat_template_path)
    note = check_rows(tokenizer, data, f"{config}: data", system_prompts=settings.system_prompts)
    if note and arguments.process_index == 0:
        print(f"{settings.stage}: note: {note}; `posttraining preview` with the same words shows more", flush=True)


def _next(settings: SftSettings, config: str) -> str:
    model = settings.output_dir
    if settings.stage != STAGE:
        return stage_command(STAGE, config, {"model": model, "output_dir": free_folder(model, STAGE)})
    if settings.early_at is None:
        return stage_command(
            "evaluate", config, {"models": {STAGE: model}, "output_dir": free_folder(model, "sft-scores")}
        )
    keys = {"model": model, "weak_model": str(Path(model) / "early"), "output_dir": free_folder(model, "pairs")}
    return stage_command("pairs", config, keys)


def build(settings: SftSettings, arguments: Any, data: Any, held_out: Any | None = None) -> tuple[Any, Any]:
    """TRL's trainer for `data`, and the tokenizer with the chat template. `arguments`: an SFTConfig."""
    from trl import SFTTrainer

    from posttraining.training import EvaluateLast

    model = load_model(settings.model, **{"dtype": "auto", **(arguments.model_init_kwargs or {})})
    tokenizer = load_tokenizer(settings.model)
    prepare_tokenizer(tokenizer, model)
    arguments.model_init_kwargs = None  # they have been used
    with template_mistakes(f"{settings.model}: data"):
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer
        )
    for rows, key in ((trainer.train_dataset, "data"), (trainer.eval_dataset, "data.held_out_path")):
        if rows is not None and len(rows) == 0:
            expected = f"no row has anything to learn in its first max_length {arguments.max_length} tokens"
            raise mistake(settings.model, key, NO_VALUE, expected)
    if held_out is not None and arguments.eval_strategy == "no":
        trainer.add_callback(EvaluateLast())
    return trainer, tokenizer
