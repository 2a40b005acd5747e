"""Hugging Face folders: what must be in one, loading, and saving one that generation stops in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttraining.chat import name_special_tokens
from posttraining.errors import NO_VALUE, mistake

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(path: str | Path) -> Path:
    """The folder at `path`; Mistake where it does not hold a config.json, a tokenizer and safetensors weights."""
    folder = Path(path)
    if not folder.is_dir():
        raise mistake(folder, None, NO_VALUE, "no such folder; expected a model in Hugging Face form")
    if not (folder / "config.json").is_file():
        raise mistake(folder, None, NO_VALUE, "no config.json; expected a model in Hugging Face form")
    read_config(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise mistake(folder, None, NO_VALUE, f"no tokenizer; expected {' or '.join(TOKENIZER_FILES)}")
    if not any(folder.glob("*.safetensors")):
        raise mistake(folder, None, NO_VALUE, "no *.safetensors file; expected a folder with weights")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says; Mistake where it is not a model's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise mistake(folder / "config.json", None, NO_VALUE, f"not JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise mistake(folder / "config.json", None, NO_VALUE, "names no model_type; expected a model's config")
    return config


def check_length(folder: Path, key: str, length: int | None, file: str | Path | None = None) -> None:
    """Raise Mistake where `length` tokens (the value of `key`) are more than the model's context."""
    context = read_config(folder).get("max_position_embeddings")
    if length is not None and isinstance(context, int) and length > context:
        raise mistake(file, key, length, f"expected at most {context}, the context of {folder}")


def load_model(path: str | Path, dtype: str = "auto", **kwargs: Any) -> Any:
    """The causal language model in a folder, in evaluation mode; `dtype`: a torch dtype's name, auto = the folder's.

    Further arguments go to from_pretrained. Raises Mistake where transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_model_folder(path)
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs).eval()
    except (ValueError, OSError, RuntimeError, LookupError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise mistake(folder, None, NO_VALUE, f"transformers cannot read the model: {''.join(reason)}") from error
    finally:
        if had_bar:
            logging.enable_progress_bar()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a model's folder. Raises Mistake where transformers cannot read it."""
    from transformers import AutoTokenizer

    folder = check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, LookupError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise mistake(folder, None, NO_VALUE, f"transformers cannot read the tokenizer: {''.join(reason)}") from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights, configs and tokenizer into `folder`; generation stops at the end of a turn and never at a pad."""
    model.save_pretrained(folder)
    save_tokenizer_and_configs(model, tokenizer, folder)


def save_tokenizer_and_configs(model: Any, tokenizer: Any, folder: Path) -> None:
    """`save_model` without the weights, which are in `folder` already."""
    name_special_tokens(model, tokenizer)
    assert tokenizer.pad_token_id not in model.generation_config.eos_token_id
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
