"""Preference optimisation: APO-zero, APO-down or DPO, through TRL's DPOTrainer.

    posttraining prefer tiny --set model=runs/sft --set data.path=runs/pairs/pairs.jsonl --set loss_type=[apo_zero]

With c and r the log-ratios of the policy to the reference for the chosen and the rejected answer, σ the logistic
function and β = `beta`, the losses of a pair are (D'Oosterlinck et al. 2024, arXiv 2408.06266; Rafailov et al. 2023,
arXiv 2305.18290)

    apo_zero   (1 - σ(βc)) + σ(βr)             chosen more likely, rejected less
    apo_down   σ(βc) + (1 - σ(β(c - r)))       both less likely, the rejected one more so
    sigmoid    -log σ(β(c - r))                DPO: only the difference counts

An answer's probability is that of its tokens to the one that ends its last turn, as in `sft`.

What the held-out pairs' margin, log p(chosen) - log p(rejected), gained is written to margins.json, where
`precompute_ref_log_probs` has the reference's computed ahead.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttraining.chat import end_tokens, require_template, template_mistakes
from posttraining.datasets import DataSettings, load_data, load_held_out
from posttraining.errors import NO_VALUE, mistake
from posttraining.guard import require_sft
from posttraining.model_folder import check_length, check_model_folder, load_model, load_tokenizer
from posttraining.next_line import free_folder, stage_command
from posttraining.pair_turns import pairs_as_conversations, to_end_of_turn
from posttraining.settings import StageSettings, build, read_mapping

STAGE = "prefer"
MARGINS = "margins.json"

_COLUMNS = ("prompt", "chosen", "rejected", "chat_template_kwargs", "tools")
_ANSWERS = ("chosen_ids", "rejected_ids")
"""Where the trainer has the tokens that follow the prompt's."""
_OF_DIFFERENCES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "apo_zero", "discopop", "sigmoid_norm")
"""Losses without a gradient where chosen and rejected are equal; others move such an answer all the same."""


@dataclass(kw_only=True)
class PreferSettings(StageSettings):
    """Keys of prefer.yaml beside those of TRL's DPOConfig."""

    data: DataSettings
    """Pairs: rows with `prompt`, `chosen` and `rejected`, messages, or text that becomes a user's and an assistant's
    turns. With `precompute_ref_log_probs` margins are measured on those of `data.held_out_path`."""


def run(config: str, overrides: Sequence[str] = (), force: str | None = None) -> str | None:
    """Train the config's `model` on pairs into its `output_dir`, or go on where a killed run was.

    Returns what to call next, in the main process.
    Raises Mistake, also where the model had no SFT and `force` gives no reason.
    """
    mapping, _ = read_mapping(config, STAGE, overrides)
    if not train(mapping, config, force):
        return None
    model = str(mapping["output_dir"])
    return stage_command("grpo", config, {"model": model, "output_dir": free_folder(model, "grpo")})


def train(mapping: Mapping[str, Any], config: str, force: str | None = None) -> bool:
    """`run` for keys that are read already; `config` is what messages name. True in the main process."""
    from trl import DPOConfig

    from posttraining import training

    settings, arguments = build(mapping, config, (PreferSettings, DPOConfig))
    folder = check_model_folder(settings.model)
    forced = require_sft(folder, STAGE, force)
    check_length(folder, "max_length", arguments.max_length, config)
    with training.begin(settings, arguments, STAGE, mapping, forced) as work:
        data, held_out = load_data(settings.data, "pairs", config), load_held_out(settings.data, "pairs", config)
        trainer, tokenizer = make_trainer(settings, arguments, data, held_out)
        training.train(trainer, work)
        gained = margins(trainer) if held_out is not None and arguments.precompute_ref_log_probs else None
        extra = {MARGINS: json.dumps(gained, indent=2) + "\n"} if gained else {}
        training.finish(trainer, work, tokenizer, data, extra)
    main = bool(trainer.is_world_process_zero())
    if main:
        losses = "+".join(arguments.loss_type)
        print(f"{STAGE}: {trainer.state.global_step} steps of {losses}, in {settings.output_dir}")
        if gained:
            print(f"{STAGE}: margin of {gained['pairs']} held-out pairs {_shown(gained['gain'])} nats")
        elif held_out is not None:
            print(f"{STAGE}: note: no margins of the held-out pairs, which need precompute_ref_log_probs: true")
    return main


def make_trainer(settings: PreferSettings, arguments: Any, data: Any, held_out: Any | None) -> tuple[Any, Any]:
    """TRL's trainer for pairs, and the tokenizer. `arguments`: a DPOConfig."""
    model = load_model(settings.model, **{"dtype": "auto", **(arguments.model_init_kwargs or {})})
    tokenizer = load_tokenizer(settings.model)
    require_template(tokenizer, Path(settings.model))
    arguments.model_init_kwargs = None  # they have been used
    with template_mistakes(f"{settings.model}: data"):
        trainer = _trainer_class(settings.model, end_tokens(model.generation_config, tokenizer))(
            model=model,
            args=arguments,
            train_dataset=_pairs_only(data),
            eval_dataset=None if held_out is None else _pairs_only(held_out),
            processing_class=tokenizer,
        )
    return trainer, tokenizer


def _trainer_class(model: str, ends: Collection[int]) -> Any:
    """TRL's trainer, which says how many pairs it leaves out, those whose prompts fill `max_length`, and in how many
    there is nothing to prefer; and refuses data of which none is left, before it computes anything from them. Its
    answers end with one of the tokens `ends`."""
    from trl import DPOTrainer
    from trl.trainer.utils import global_then_local_main_first

    class NotingTrainer(DPOTrainer):  # type: ignore[misc,unused-ignore]
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            left_out, key = len(dataset) - len(prepared), "data.held_out_path" if dataset_name == "eval" else "data"
            reason = f"prompts that alone have max_length {args.max_length} tokens or more"
            if len(prepared) == 0:
                raise mistake(model, key, NO_VALUE, f"has only {reason}")
            if args.process_index == 0:
                note = f"{STAGE}: note: {key}:"
                if left_out:
                    print(f"{note} {left_out:,} of {len(dataset):,} pairs are left out: {reason}", flush=True)
                equal = sum(row["chosen"] == row["rejected"] for row in prepared.select_columns(["chosen", "rejected"]))
                if equal:
                    meaning = _meaning_of_equal(args.loss_type, held_out=dataset_name == "eval")
                    said = f"chosen and rejected are equal in {equal:,} of {len(prepared):,} pairs: {meaning}"
                    print(f"{note} {said}", flush=True)
            with global_then_local_main_first():  # the others read what it has written
                return prepared.map(
                    to_end_of_turn,
                    fn_kwargs={"tokenizer": processing_class, "ends": sorted(ends), "columns": _ANSWERS},
                    num_proc=args.dataset_num_proc,
                )

    return NotingTrainer


def _meaning_of_equal(losses: Sequence[str], *, held_out: bool) -> str:
    if held_out:
        return "their margin is always 0"
    if set(losses) <= set(_OF_DIFFERENCES):
        return "nothing is learnt from them"
    return "no preference is learnt from them"


def margins(trainer: Any) -> dict[str, Any]:
    """What training did to the held-out pairs: mean log p(chosen) - log p(rejected) before and after, in nats.

    `gain` has the standard error of the paired differences; `ranked_*` is the share of pairs whose chosen answer is
    the likelier one. Before is the reference, whose log-probabilities the trainer computed ahead.
    """
    import torch

    from posttraining.evaluate.scoring import estimate

    after: list[float] = []
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model_wrapped, batch)
            after += trainer.accelerator.gather_for_metrics(chosen - rejected).tolist()
    reference = trainer.eval_dataset.with_format(None)
    before = [c - r for c, r in zip(reference["ref_chosen_logps"], reference["ref_rejected_logps"], strict=True)]
    return {
        "pairs": len(after),
        "before": asdict(estimate(before)),
        "after": asdict(estimate(after)),
        "gain": asdict(estimate([new - old for old, new in zip(before, after, strict=True)])),
        "ranked_before": sum(value > 0 for value in before) / len(before),
        "ranked_after": sum(value > 0 for value in after) / len(after),
    }


def _shown(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:+.3f} ± {gain['error']:.3f}"


def _pairs_only(data: Any) -> Any:
    """What the trainer reads: conversations, for it renders text without the chat template."""
    data = pairs_as_conversations(data)
    return data.select_columns([name for name in _COLUMNS if name in data.column_names])
