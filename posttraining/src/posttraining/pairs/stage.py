"""Preference pairs: a strong model's answers are chosen, a weaker one's are rejected.

    posttraining pairs tiny --set model=runs/sft --set weak_model=runs/sft/early --set output_dir=runs/pairs

By default the two are the SFT model and an early checkpoint of the same run. Answers lie in files of a chunk of prompts
each, so a killed run goes on and several nodes share the work (`shards`, `shard`); whoever finds the last file there
filters, and writes pairs.jsonl, held_out.jsonl and a data card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttraining import lineage
from posttraining.chat import require_template
from posttraining.datasets import data_fingerprint
from posttraining.errors import StageFailed
from posttraining.files import own_work_folder, publish
from posttraining.guard import SFT
from posttraining.model_folder import check_finite, check_length, check_model_folder, load_tokenizer
from posttraining.next_line import free_folder, stage_command
from posttraining.pairs.answers import SIDES, generate_missing, is_complete, read_answers, side_settings
from posttraining.pairs.card import render_card
from posttraining.pairs.filters import Filters
from posttraining.pairs.prompts import Prompt, load_prompts
from posttraining.pairs.settings import PairsSettings
from posttraining.prompt_length import check_prompts
from posttraining.settings import load

STAGE = "pairs"
TRAIN, HELD_OUT = "pairs.jsonl", "held_out.jsonl"

_OF_THE_PROCESS = ("shard", "cpu_threads")
"""Keys that do not change what is generated."""


def run(config: str, overrides: Sequence[str] = ()) -> str | None:
    """Generate what is missing of this shard's answers, and write the pairs where none is.

    Returns what to call next where the pairs are written. Raises Mistake; StageFailed where the filters leave no pair.
    """
    from posttraining.training import quiet

    (settings,), mapping = load(config, STAGE, (PairsSettings,), overrides)
    quiet(settings.cpu_threads)
    hashes: dict[str, str] = {side: _checked_model(settings, side, config) for side in SIDES}
    prompts, repeated = load_prompts(settings, config)
    turns = [prompt.turns for prompt in prompts]
    for side in SIDES:
        model, how = side_settings(settings, side)
        tokenizer, where = load_tokenizer(model), f"{config}: {side}"
        check_prompts(Path(model), tokenizer, turns, how.max_new_tokens, where, how.template)
    kept = {key: value for key, value in mapping.items() if key not in _OF_THE_PROCESS}
    output = Path(settings.output_dir)
    content = {"config": {key: value for key, value in kept.items() if key != "filters"}, "models": hashes}
    with own_work_folder(output, content, settings.shard if settings.shards > 1 else None) as work:
        generate_missing(settings, prompts, work)
        if is_complete(settings, prompts, work):
            held_out = _write_once(settings, prompts, repeated, work, hashes, kept)
            shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock while it is held
            return _next(settings, config, held_out)
    print(f"pairs: shard {settings.shard} of {settings.shards} has all its answers in {work}")
    print("pairs: the shard that ends last writes the pairs; start again those that were killed")
    return None


def _checked_model(settings: PairsSettings, side: Any, config: str) -> str:
    """The weights' hash of a side's model, which has a chat template and room for the answers; Mistake otherwise."""
    model, how = side_settings(settings, side)
    folder = check_model_folder(model)
    check_length(folder, f"{side}.max_new_tokens", how.max_new_tokens, config)
    require_template(load_tokenizer(folder), folder)
    check_finite(folder)
    return lineage.weights_sha256(folder)


def _write_once(settings: PairsSettings, *arguments: Any) -> bool:
    """`_write`, unless another shard that ends at the same time is faster: it writes the same pairs and takes the
    answers away, at whatever point this one is."""
    output = Path(settings.output_dir)
    try:
        return _write(settings, *arguments)
    except OSError:
        if not (output / TRAIN).is_file():
            raise
        return (output / HELD_OUT).stat().st_size > 0


def _write(
    settings: PairsSettings,
    prompts: Sequence[Prompt],
    repeated: int,
    work: Path,
    hashes: Mapping[str, str],
    config: Mapping[str, Any],
) -> bool:
    """Write the folder of the pairs; returns whether any are held out."""
    output = Path(settings.output_dir)
    filters = Filters(settings.filters, thinking=settings.chosen.template.get("enable_thinking", True))
    rows: dict[str, list[dict[str, Any]]] = {TRAIN: [], HELD_OUT: []}
    sides = [read_answers(settings, prompts, work, side) for side in SIDES]
    for prompt, chosen, rejected in zip(prompts, *sides, strict=True):
        pair = filters.choose(prompt, chosen, rejected)
        if pair is not None:
            rows[HELD_OUT if prompt.held_out else TRAIN].append(_row(settings, prompt, pair, hashes))
    if not rows[TRAIN]:
        counts = ", ".join(f"{count} {why}" for why, count in filters.reasons.most_common())
        raise StageFailed(
            f"pairs: no prompt gave a pair ({counts}); the answers are kept: start again with other filters"
        )
    fingerprints = {name: data_fingerprint(pairs) for name, pairs in rows.items()}
    folder = work / f"pairs-{settings.shard}"  # of several shards that end at once each fills its own
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, pairs in rows.items():
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs), "utf-8")
    card = render_card(
        rows=rows,
        reasons=filters.reasons,
        repeated=repeated,
        prompts=len(prompts),
        fingerprints=fingerprints,
        config=config,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    publish(folder, output)
    print(f"pairs: {len(rows[TRAIN])} and {len(rows[HELD_OUT])} held out, of {len(prompts)} prompts, in {output}")
    for why, count in filters.reasons.most_common():
        print(f"pairs:   {count} prompts gave none: {why}")
    return bool(rows[HELD_OUT])


def _next(settings: PairsSettings, config: str, held_out: bool) -> str:
    output = settings.output_dir
    data = {"path": str(Path(output) / TRAIN)}
    keys: dict[str, Any] = {"data": data, "output_dir": free_folder(output, "apo")}
    if SFT in lineage.stage_names(Path(settings.model)):  # else a model of others, not one to be trained
        keys["model"] = settings.model
    if held_out:
        data["held_out_path"] = str(Path(output) / HELD_OUT)
    else:
        keys |= {"eval_strategy": "no", "eval_on_start": False}
    return stage_command("prefer", config, keys)


def _row(settings: PairsSettings, prompt: Prompt, pair: Any, hashes: Mapping[str, str]) -> dict[str, Any]:
    """One pair; with the template's arguments, so that training renders the prompt that was answered."""
    generation: dict[str, Any] = {}
    row: dict[str, Any] = {"prompt": prompt.turns, "answer": prompt.answer}
    if settings.chosen.template:
        row["chat_template_kwargs"] = settings.chosen.template
    for side, answer in zip(SIDES, pair, strict=True):
        model, how = side_settings(settings, side)
        row[side] = [{"role": "assistant", "content": answer.text}]
        generation[side] = {
            "model": model,
            "weights_sha256": hashes[side],
            "temperature": how.temperature,
            "max_new_tokens": how.max_new_tokens,
            "samples": how.samples,
            "backend": how.backend,
            "template": how.template,
            "seed": settings.seed,
            "tokens": answer.tokens,
        }
    return {**row, "generation": generation}
