"""Hugging Face folders: what must be in one, loading, and saving one that generation stops in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttraining.chat import name_special_tokens
from posttraining.errors import NO_VALUE, mistake
from posttraining.files import reading

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(path: str | Path) -> Path:
    """The folder at `path`; Mistake where it does not hold a config.json, a tokenizer and whole safetensors files."""
    folder = Path(path)
    with reading(folder):
        if not folder.is_dir():
            raise mistake(folder, None, NO_VALUE, "no such folder; expected a model in Hugging Face form")
        if not (folder / "config.json").is_file():
            raise mistake(folder, None, NO_VALUE, "no config.json; expected a model in Hugging Face form")
        read_config(folder)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise mistake(folder, None, NO_VALUE, f"no tokenizer; expected {' or '.join(TOKENIZER_FILES)}")
        if not any(folder.glob("*.safetensors")):
            raise mistake(folder, None, NO_VALUE, "no *.safetensors file; expected a folder with weights")
        _check_files(folder)
    return folder


def check_finite(folder: Path) -> None:
    """Raise Mistake where a weight of the model in `folder` is infinite or no number. Reads all of them."""
    with reading(folder):
        found = find_not_finite(folder)
    if found is not None:
        raise mistake(*found, NO_VALUE, "has values that are infinite or no numbers")


def find_not_finite(folder: Path) -> tuple[Path, str] | None:
    """The first file and tensor with a weight that is infinite or no number; None where all are finite. Reads all."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return path, name
    return None


def _check_files(folder: Path) -> None:
    """Raise Mistake where a safetensors file is cut short or damaged, or one that the index names is not there."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise mistake(path, None, NO_VALUE, f"is cut short or damaged ({error})") from error
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise mistake(index, None, NO_VALUE, f"is no index of weights ({error})") from error
    for name in sorted(named):
        if not (folder / name).is_file():
            raise mistake(folder / name, None, NO_VALUE, f"is not there, and {INDEX} names it")


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

    Further arguments go to from_pretrained. Raises Mistake where transformers cannot read it, and where a weight that
    the config asks for is missing or has another shape, which transformers would replace by random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_model_folder(path)
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said in one line below
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **{"ignore_mismatched_sizes": True, **kwargs},
        )
    except (ValueError, OSError, RuntimeError, LookupError, ImportError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise mistake(folder, None, NO_VALUE, f"transformers cannot read the model: {''.join(reason)}") from error
    finally:
        if had_bar:
            logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    _check_loaded(folder, found)
    return model.eval()


def _check_loaded(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise Mistake where what from_pretrained reports shows that some weights are not those of the files."""
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        expected = f"expected the shape {tuple(wanted)}, which config.json asks for"
        raise mistake(folder, name, tuple(stored), expected)
    missing = sorted(found["missing_keys"])
    if missing:
        others = f" (nor are {len(missing) - 1} others)" if missing[1:] else ""
        raise mistake(folder, missing[0], NO_VALUE, f"is in none of the files, and config.json asks for it{others}")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a model's folder. Raises Mistake where transformers cannot read it."""
    from transformers import AutoTokenizer

    folder = check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, LookupError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise mistake(folder, None, NO_VALUE, f"transformers cannot read the tokenizer: {''.join(reason)}") from error


def load_generation_config(folder: Path) -> Any:
    """What a model's folder says of generation; what its config.json says of it where it has no file for that."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))


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
