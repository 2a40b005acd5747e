"""The small files of a Hugging Face folder, and what transformers makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def copy_tokenizer(tokenizer_dir: Path, out: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names. UserError when the folder holds no tokenizer."""
    names = [name for name in TOKENIZER_FILES if (tokenizer_dir / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        raise UserError(f"{tokenizer_dir}: no tokenizer here; expected a folder with tokenizer.json")
    for name in names:
        shutil.copyfile(tokenizer_dir / name, out / name)
    return names


def tokenizer_token_ids(tokenizer_dir: Path) -> dict[str, int]:
    """Ids of the tokens that a tokenizer folder names as "bos", "eos" and "pad"; those it has not are left out.

    Raises UserError where its files are not those of a tokenizer.
    """
    config = _json(tokenizer_dir / "tokenizer_config.json")
    vocabulary = _vocabulary(tokenizer_dir / "tokenizer.json")
    ids = {}
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in vocabulary:
            ids[kind] = vocabulary[text]
    return ids


def tokenizer_vocab_size(tokenizer_dir: Path) -> int | None:
    """Highest token id of a tokenizer folder plus one; None where tokenizer.json does not tell.

    Raises UserError where tokenizer.json is not that of a tokenizer.
    """
    vocabulary = _vocabulary(tokenizer_dir / "tokenizer.json")
    return max(vocabulary.values()) + 1 if vocabulary else None


def load_with_transformers(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal language model in a folder, in evaluation mode, without a progress bar; "auto": in its own dtype.

    Raises UserError where transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except MemoryError:
        raise
    except Exception as error:  # of a damaged folder the libraries below raise whatever they like
        raise UserError(f"{folder}: transformers cannot read the model: {str(error).splitlines()[0]}") from error
    finally:
        if had_bar:
            logging.enable_progress_bar()


def _vocabulary(path: Path) -> dict[str, int]:
    tokenizer = _json(path)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    listed = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(listed, list):  # Unigram: pairs of token and score, in the order of their ids
            listed = {pair[0]: number for number, pair in enumerate(listed)}
        vocabulary = dict(listed) if isinstance(listed, dict) else {}
        if isinstance(added, list):
            vocabulary |= {token["content"]: token["id"] for token in added}
    except (TypeError, LookupError):
        vocabulary = {"": None}
    if not all(isinstance(token, str) and isinstance(number, int) for token, number in vocabulary.items()):
        raise UserError(f"{path}: not a tokenizer in Hugging Face form")
    return vocabulary


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}
