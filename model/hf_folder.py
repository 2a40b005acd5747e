"""A folder that appears whole or not at all, and the small files of a Hugging Face folder."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync

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


@contextmanager
def whole_folder(out: Path, *, marker: str | None) -> Iterator[Path]:
    """Yield a folder beside `out` to fill; when the block ends it is made durable and takes the name `out`.

    An `out` that is not empty is replaced in one step when it contains the file `marker`, otherwise refused
    (UserError); nothing at `out` changes when the block raises or the process dies.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is not a folder; expected a new or empty one")
    if out.is_dir() and any(out.iterdir()) and not (marker and (out / marker).is_file()):
        raise UserError(f"{out}: is not empty and was not written by this command; expected a new or empty folder")
    beside = out.with_name(f".{out.name}.partial")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in sorted(beside.rglob("*")):
            sync(path)
        sync(beside)
        if out.is_dir() and any(out.iterdir()):
            _exchange(beside, out)
        else:
            beside.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system can (Linux renameat2), else with two renames."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return
    aside = old.with_name(f".{old.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside)


def copy_tokenizer(tokenizer_dir: Path, out: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names. UserError when the folder holds no tokenizer."""
    names = [name for name in TOKENIZER_FILES if (tokenizer_dir / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        raise UserError(f"{tokenizer_dir}: no tokenizer here; expected a folder with tokenizer.json")
    for name in names:
        shutil.copyfile(tokenizer_dir / name, out / name)
    return names


def tokenizer_token_ids(tokenizer_dir: Path) -> dict[str, int]:
    """Ids of the tokens that a tokenizer folder names as "bos", "eos" and "pad"; those it has not are left out."""
    config = _json(tokenizer_dir / "tokenizer_config.json")
    tokenizer = _json(tokenizer_dir / "tokenizer.json")
    vocabulary = _vocabulary(tokenizer)
    ids = {}
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in vocabulary:
            ids[kind] = vocabulary[text]
    return ids


def tokenizer_vocab_size(tokenizer_dir: Path) -> int | None:
    """Highest token id of a tokenizer folder plus one; None where tokenizer.json does not tell."""
    vocabulary = _vocabulary(_json(tokenizer_dir / "tokenizer.json"))
    return max(vocabulary.values()) + 1 if vocabulary else None


def load_with_transformers(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal language model in a folder, in evaluation mode, without a progress bar; "auto": in its own dtype."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    finally:
        if had_bar:
            logging.enable_progress_bar()


def _vocabulary(tokenizer: dict[str, object]) -> dict[str, int]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):  # Unigram: pairs of token and score, in the order of their ids
        listed = {pair[0]: number for number, pair in enumerate(listed)}
    vocabulary = dict(listed) if isinstance(listed, dict) else {}
    if isinstance(added, list):
        vocabulary |= {token["content"]: token["id"] for token in added}
    return vocabulary


def _json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}
