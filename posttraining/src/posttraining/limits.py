"""Values that have the right type and that torch or TRL would stumble over later: refused where a config is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttraining.errors import mistake, nearest_name

Limit = tuple[Callable[[Any], bool], str]
"""What a value has to be: the test, and the words for it."""

_ONE: Limit = (lambda value: value >= 1, "expected at least 1")
_ABOVE_ZERO: Limit = (lambda value: math.isfinite(value) and value > 0, "expected a number above 0")
_FROM_ZERO: Limit = (lambda value: math.isfinite(value) and value >= 0, "expected a finite number, at least 0")
_DECAY: Limit = (lambda value: 0 <= value < 1, "expected a number from 0 to below 1")
_FINITE: Limit = (math.isfinite, "expected a finite number")
# numpy, which the trainers seed too, takes 32 bits.
_SEED: Limit = (lambda value: 0 <= value < 2**32, "expected a whole number from 0 to 2**32 - 1")

_EVERYWHERE: Mapping[str, Limit] = {"cpu_threads": _ONE}
_TRAINING: Mapping[str, Limit] = {
    # A step of Adam moves each weight by about the learning rate (Kingma and Ba 2015, section 2.1), and weights are
    # mostly below 1.
    "learning_rate": (lambda value: 0 < value <= 1, "expected a number above 0, at most 1"),
    "weight_decay": _FROM_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "adam_epsilon": _FROM_ZERO,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "per_device_train_batch_size": _ONE,
    "per_device_eval_batch_size": _ONE,
    "gradient_accumulation_steps": _ONE,
    "seed": _SEED,
    "data_seed": _SEED,
    "save_steps": _ABOVE_ZERO,
    "logging_steps": _ABOVE_ZERO,
    "max_steps": (lambda value: value == -1 or value > 0, "expected at least 1, or -1: num_train_epochs decides"),
    "num_train_epochs": _ABOVE_ZERO,
    "max_length": _ONE,
    "num_generations": (lambda value: value >= 2, "expected at least 2, which are compared with each other"),
    "max_completion_length": _ONE,
    "temperature": _ABOVE_ZERO,
    "alarms.window": _ONE,
    "alarms.length_growth": _FINITE,
    "alarms.waits_rise": _FINITE,
}

# What the trainers of TRL 1.x compare `loss_type` with.
_LOSSES: Mapping[str, tuple[str, ...]] = {
    "SFTConfig": ("nll", "dft"),
    "DPOConfig": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "GRPOConfig": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
}

# What TRL takes for the file of a template and not for a tokenizer's folder.
_TEMPLATES = (".jinja", ".j2")


def check_values(cls: str, values: Mapping[str, Any], file: str | Path, prefix: str) -> None:
    """Raise Mistake where one of `values`, which are keys of the class `cls`, is out of its limits; one that is no
    number where its limits are those of one is passed over.

    `prefix`: of the keys, where they are a section's.
    """
    trains = cls in _LOSSES
    limits = {**_EVERYWHERE, **(_TRAINING if trains or prefix else {})}
    if cls == "DPOConfig":
        limits["beta"] = _ABOVE_ZERO
    for name, value in values.items():
        fits, expected = limits.get(f"{prefix}{name}", (None, ""))
        if fits is not None and isinstance(value, int | float) and not fits(value):
            raise mistake(file, f"{prefix}{name}", value, expected)
    if trains:
        _check_losses(cls, values, file)
    packs = True in (values.get("packing"), values.get("eval_packing"))
    if packs and values.get("max_length", 0) is None:
        raise mistake(file, "max_length", None, "expected a number; packing fills rows of that many tokens")


def _check_losses(cls: str, values: Mapping[str, Any], file: str | Path) -> None:
    if "loss_type" not in values:
        return
    known, given = _LOSSES[cls], values["loss_type"]
    names = given if isinstance(given, list) else [given]
    for name in names or [""]:
        if name not in known:
            nearest = nearest_name(str(name), known)
            raise mistake(file, "loss_type", given, f"expected one of {', '.join(known)}", nearest)


def check_template_file(values: Mapping[str, Any], file: str | Path) -> None:
    """Raise Mistake where `chat_template_path` is not the file of a template: TRL would look for a tokenizer there."""
    path = values.get("chat_template_path")
    if isinstance(path, str) and not (path.endswith(_TEMPLATES) and Path(path).is_file()):
        raise mistake(file, "chat_template_path", path, f"expected a file that ends in {' or '.join(_TEMPLATES)}")


def check_evaluation(arguments: Any, settings: Any) -> None:
    """Raise Mistake where a trainer's `arguments` ask for evaluations and the data of a stage's `settings` have no rows
    for them."""
    if settings.data.held_out_path is not None:
        return
    expected = "there are no rows to evaluate on; sft and prefer read them from data.held_out_path"
    if arguments.eval_strategy != "no":
        raise mistake(None, "eval_strategy", str(arguments.eval_strategy.value), expected)
    if arguments.eval_on_start:
        raise mistake(None, "eval_on_start", True, expected)


def check_packages(arguments: Any) -> None:
    """Raise Mistake where a trainer's `arguments` need a package that is not there, or too old: a tracker's, an
    optimizer's, vllm or liger-kernel."""
    from transformers import Trainer
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from transformers.utils import is_liger_kernel_available

    available = get_available_reporting_integrations()
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            expected = f"expected none, all or one of {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise mistake(None, "report_to", name, expected, nearest_name(str(name), INTEGRATION_TO_CALLBACK))
        if name not in available:
            raise mistake(None, "report_to", name, "needs its package, which is not installed")
    if getattr(arguments, "use_vllm", False) and find_spec("vllm") is None:
        raise mistake(None, "use_vllm", True, "needs the package vllm, which is not installed")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        old = find_spec("liger_kernel") is not None
        expected = f"needs the package liger-kernel, which is {'too old' if old else 'not installed'}"
        raise mistake(None, "use_liger_kernel", True, expected)
    try:
        with suppress(ValueError):  # some want the model, which is asked for after the package
            Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise mistake(None, "optim", str(arguments.optim.value), "needs its package, which is not installed") from error
