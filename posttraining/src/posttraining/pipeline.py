"""The whole of post-training from one config: each stage a process of its own, skipped when it is done.

    posttraining pipeline tiny --set model=runs/latest-export/export

A stage's folder is there whole or not at all, so being there is being done; `stages/<name>.json` says with which
settings. A pipeline that was killed is started again with the same words and goes on.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttraining import lineage
from posttraining.card import write_card
from posttraining.errors import NO_VALUE, Mistake, StageFailed, mistake, nearest_name
from posttraining.files import write_whole
from posttraining.model_folder import check_model_folder
from posttraining.next_line import chat_command
from posttraining.report import write_report
from posttraining.settings import load, read_mapping
from posttraining.stage_check import check_stages, takes_seed
from posttraining.tables import show_tables

COMMANDS = ("sft", "pairs", "prefer", "compare", "grpo", "merge", "evaluate")
TRAINING = ("sft", "prefer", "compare", "grpo")
"""Commands that the pipeline's `launcher` starts."""
_LEAVE_A_MODEL = ("sft", "prefer", "grpo", "merge")
BASE = "model"
"""The name by which stages refer to the folder that the pipeline starts from."""

_REFERENCE = re.compile(r"\{([\w-]+)\}")
_HALF_REFERENCE = re.compile(r"\{([\w-]+)(?![\w}-])|(?<![\w{-])([\w-]+)\}")


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a pipeline."""

    name: str
    """Its folder in `output_dir`, and what later stages call it."""
    command: str
    """sft, pairs, prefer, compare, grpo, merge or evaluate."""
    recipe: str
    """A shipped name or a path, as the command takes it."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of that recipe to change. `{sft}` in a text is the folder of the stage sft, `{model}` the pipeline's own."""


@dataclass(kw_only=True)
class PipelineSettings:
    """Keys of pipeline.yaml."""

    model: str
    """The pretrained model, in Hugging Face form: the exporter's folder."""
    output_dir: str
    """Where every stage gets a folder; report.md and report.json are written here."""
    seed: int = 42
    """The seed of every stage that takes one, unless its `set` gives another; compare has `seeds` of its own."""
    stages: list[PipelineStage]
    """In the order in which they run."""
    final: str
    """The stage whose model is the result; its folder gets the model card."""
    launcher: list[str] = field(default_factory=list)
    """What stands before `-m posttraining.pipeline_stage …` in place of this Python where a stage trains, such as
    [accelerate, launch, --config_file, posttraining/accelerate/zero3.yaml]; empty: this Python."""


@dataclass(frozen=True)
class Planned:
    """A stage with everything filled in."""

    stage: PipelineStage
    folder: Path
    overrides: list[str]
    fingerprint: str
    """Of the recipe with its overrides and of every stage before it that it uses."""


def run(config: str, overrides: Sequence[str] = ()) -> str:
    """Run the stages that are not done, then write report and model card.

    Returns what to call next.
    Raises Mistake (a bad config; a stage made with other settings), StageFailed (a stage's process ended badly).
    """
    (settings,), _ = load(config, "pipeline", (PipelineSettings,), overrides)
    planned = plan(settings, config)
    output = Path(settings.output_dir)
    if not all(one.folder.exists() for one in planned):
        stages = [(one.stage.command, one.stage.recipe, one.overrides) for one in planned]
        check_stages(stages, elsewhere=bool(settings.launcher))
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as lock:
        _lock(lock.fileno(), output)
        todo = [one for one in planned if not _is_done(output, one)]
        for number, one in enumerate(planned, 1):
            heading = f"[{number}/{len(planned)}] {one.stage.name}"
            if one not in todo:
                print(f"{heading}: done before, in {one.folder}", flush=True)
                continue
            print(f"{heading}: posttraining {one.stage.command} {one.stage.recipe} → {one.folder}", flush=True)
            _run_stage(settings, output, one, lock.fileno())
        return chat_command(_conclude(settings, output, planned))


def plan(settings: PipelineSettings, file: str) -> list[Planned]:
    """Every stage with its folder, its overrides and its fingerprint. Raises Mistake; runs nothing."""
    _check(settings, file)
    output, base = Path(settings.output_dir), Path(settings.model)
    check_model_folder(base)
    folders, fingerprints = {BASE: str(base)}, {BASE: lineage.weights_sha256(base)}
    planned = []
    for stage in settings.stages:
        folder = output / stage.name
        used: list[str] = []
        keys = {key: _filled(value, folders, used, f"{file}: stages: {stage.name}") for key, value in stage.set.items()}
        keys |= {"output_dir": str(folder)}
        if takes_seed(stage.command):
            keys.setdefault("seed", settings.seed)
        words = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()}"
            for key, value in keys.items()
        ]
        words = [word.removesuffix("\n...") for word in words]
        mapping, _ = read_mapping(stage.recipe, stage.command, words)
        content = {"stage": asdict(stage), "mapping": mapping, "uses": {name: fingerprints[name] for name in used}}
        fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        folders[stage.name], fingerprints[stage.name] = str(folder), fingerprint
        planned.append(Planned(stage, folder, words, fingerprint))
    return planned


def _check(settings: PipelineSettings, file: str) -> None:
    _check_output(settings, file)
    names = [stage.name for stage in settings.stages]
    for stage in settings.stages:
        key = f"stages: {stage.name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", stage.name) or stage.name in (BASE, "stages", "plots"):
            raise mistake(file, "stages.name", stage.name, "expected letters, digits, - and _, and none of ours")
        if names.count(stage.name) > 1:
            raise mistake(file, "stages.name", stage.name, "stands twice")
        if stage.command not in COMMANDS:
            expected = f"expected one of {', '.join(COMMANDS)}"
            raise mistake(file, f"{key}: command", stage.command, expected, nearest_name(stage.command, COMMANDS))
        if "output_dir" in stage.set:
            expected = "the pipeline gives every stage a folder of its own; expected no such key"
            raise mistake(file, f"{key}: set.output_dir", stage.set["output_dir"], expected)
    models = [stage.name for stage in settings.stages if stage.command in _LEAVE_A_MODEL]
    if settings.final not in models:
        expected = f"expected a stage that leaves a model: {', '.join(models)}"
        raise mistake(file, "final", settings.final, expected, nearest_name(settings.final, models))


def _check_output(settings: PipelineSettings, file: str) -> None:
    """Raise Mistake where stages cannot have their folders in `output_dir`, or would write into the model's."""
    output, model = Path(settings.output_dir).resolve(), Path(settings.model).resolve()
    if output.is_relative_to(model):
        raise mistake(file, "output_dir", settings.output_dir, "lies in the model's folder; expected one beside it")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise mistake(file, "output_dir", settings.output_dir, f"{path} is a file; expected a folder")


def _filled(value: Any, folders: Mapping[str, str], used: list[str], where: str) -> Any:
    """`value` with every {name} in it replaced by a folder; names met are added to `used`."""
    if isinstance(value, list):
        return [_filled(entry, folders, used, where) for entry in value]
    if isinstance(value, dict):
        return {key: _filled(entry, folders, used, where) for key, entry in value.items()}
    if not isinstance(value, str):
        return value
    for opened, closed in _HALF_REFERENCE.findall(value):
        if opened in folders or closed in folders:
            raise mistake(where, "set", value, f"a brace is missing; expected {{{opened or closed}}}")
    for name in _REFERENCE.findall(value):
        if name not in folders:
            expected = f"expected a stage before this one: {', '.join(folders)}"
            raise mistake(where, "set", "{" + name + "}", expected, nearest_name(name, folders))
        if name not in used:
            used.append(name)
        value = value.replace("{" + name + "}", folders[name])
    return value


def _record_file(output: Path, one: Planned) -> Path:
    return output / "stages" / f"{one.stage.name}.json"


def _is_done(output: Path, one: Planned) -> bool:
    """Whether the stage's folder is there; Mistake where it came from other settings."""
    if not one.folder.exists():
        return False
    try:
        record = json.loads(_record_file(output, one).read_text(encoding="utf-8"))
        same = record["fingerprint"] == one.fingerprint
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        expected = "was made with other settings, or from another model; move it away or choose another output_dir"
        raise mistake(one.folder, None, NO_VALUE, expected)
    return True


def _run_stage(settings: PipelineSettings, output: Path, one: Planned, lock: int) -> None:
    record_file, started = _record_file(output, one), time.time()
    record = {
        "fingerprint": one.fingerprint,
        "command": one.stage.command,
        "recipe": one.stage.recipe,
        "set": one.overrides,
    }
    seconds = _seconds_before(record_file, one.fingerprint)
    write_whole(record_file, json.dumps(record | {"seconds": seconds}, indent=2) + "\n")
    launcher = settings.launcher if one.stage.command in TRAINING else []
    command = [
        *(launcher or [sys.executable]),
        "-m",
        "posttraining.pipeline_stage",
        one.stage.command,
        one.stage.recipe,
    ]
    for override in one.overrides:
        command += ["--set", override]
    # The child holds the lock too: where the pipeline alone is killed, the stage that goes on keeps others out.
    code = subprocess.run(command, check=False, pass_fds=[lock]).returncode
    seconds += time.time() - started
    write_whole(record_file, json.dumps(record | {"seconds": round(seconds, 1)}, indent=2) + "\n")
    if code:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        again = "mend what it says above and start again" if code == 2 else "the same command goes on from here"
        raise StageFailed(f"stage {one.stage.name} {ended}; {again}", exit_code=2 if code == 2 else 1)
    if not one.folder.is_dir():
        raise StageFailed(f"stage {one.stage.name} ended well and left no {one.folder}")


def _seconds_before(record_file: Path, fingerprint: str) -> float:
    """What earlier, ended tries of the same stage took."""
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        return float(record["seconds"]) if record["fingerprint"] == fingerprint else 0.0
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0


def _conclude(settings: PipelineSettings, output: Path, planned: Sequence[Planned]) -> Path:
    """Write report and card, and show the table. Returns the folder of the result."""
    stages = {one.stage.name: (one.stage.command, one.folder) for one in planned}
    seconds = {one.stage.name: _seconds_before(_record_file(output, one), one.fingerprint) for one in planned}
    table = write_report(output, stages, seconds)
    final = next(one.folder for one in planned if one.stage.name == settings.final)
    write_card(final, table)
    show_tables(table)
    print(f"report: {output / 'report.md'}")
    print(f"model:  {final} (its card is README.md)")
    return final


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Mistake(
            f"{output}: another pipeline, or a stage that it left, is at work there; wait for its end"
        ) from error
    os.set_inheritable(descriptor, True)
