"""The tokenizer of a recipe: a byte-level BPE trained on its corpus, in Hugging Face form, or a given folder."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.text_sample import sample_text
from nanotron_recipes.errors import UserError, shorten, user_error
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Corpus

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    PAD,
)
"""Reserved from the start, ids 0 … 9 in this order: what is added later has no trained embedding."""
_HIDDEN = frozenset({END_OF_TEXT, "<|im_start|>", "<|im_end|>", PAD})
"""Left out by `decode(…, skip_special_tokens=True)`; thoughts and tool calls are part of the text."""

SAMPLE_BYTES = 1_000_000
"""Text that each source gives to the training of the tokenizer, UTF-8: balanced, whatever their sizes."""
TRAINING_VERSION = 2
"""Part of a trained tokenizer's settings hash: raise it when the same settings shall make another one."""


@dataclass(frozen=True)
class TokenizerInfo:
    """What shards must agree on with their tokenizer."""

    folder: Path
    """The Hugging Face folder."""
    sha256: str
    """Of `tokenizer.json`, hexadecimal."""
    vocab_size: int
    """Largest token id + 1, special tokens included."""
    eos_token: str
    """The token at the end of every document."""
    eos_token_id: int
    """Its id."""

    @property
    def token_bytes(self) -> Literal[2, 4]:
        """Bytes of a token in shards."""
        return 2 if self.vocab_size <= 1 << 16 else 4

    @property
    def file(self) -> Path:
        """`tokenizer.json`, which the tokenizers library reads."""
        return self.folder / "tokenizer.json"


def tokenizer_folder(recipe: Recipe) -> Path:
    """Where the recipe's tokenizer is or will be; UserError where the recipe names none."""
    name = recipe.tokenizer.tokenizer_name_or_path
    if name is not None:
        return Path(name)
    if recipe.corpus is None or recipe.tokenizer.train is None:
        raise UserError("tokenizer: expected tokenizer_name_or_path (a folder), or train and a corpus to train it on")
    return Path(recipe.corpus.path) / "tokenizer"


def tokenizer_of(recipe: Recipe) -> TokenizerInfo:
    """The recipe's tokenizer; UserError as `read_tokenizer`, and where one that is to be trained was not or is gone."""
    folder = tokenizer_folder(recipe)
    if recipe.tokenizer.tokenizer_name_or_path is None and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; run `nanotron-recipes tokenize RECIPE` first")
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> TokenizerInfo:
    """What a tokenizer's folder says, after loading it as those who encode do; UserError where it is missing or
    damaged, or names no end-of-document token."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(
            f"tokenizer.tokenizer_name_or_path: {folder}: no folder with a tokenizer.json "
            f"(a tokenizer of the hub: `hf download {folder} --local-dir FOLDER`)"
        )
    content = _content(file)
    tokens = _tokens_of(content, file)
    try:
        config = json.loads(_content(config_file))
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{config_file}: expected a JSON object with an eos_token ({error})") from None
    if not isinstance(eos, str) or eos not in tokens:
        raise user_error("expected one of the tokenizer's tokens", source=f"{config_file}", key="eos_token", value=eos)
    return TokenizerInfo(folder, hashlib.sha256(content).hexdigest(), max(tokens.values()) + 1, eos, tokens[eos])


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _tokens_of(content: bytes, file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content).get_vocab(with_added_tokens=True)
    except BaseException as error:  # the library raises nothing more special, and where it gives up a Rust panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{file}: not a tokenizer that the tokenizers library reads ({shorten(str(error), 200)})"
        ) from None


def other_tokens(first: Path, second: Path) -> tuple[int, int]:
    """How many token ids stand for other tokens in one tokenizer's folder than in another's, and how many both have.

    Raises UserError where one of them cannot be read.
    """
    files = (folder / "tokenizer.json" for folder in (first, second))
    one, other = ({number: token for token, number in _tokens_of(_content(file), file).items()} for file in files)
    both = one.keys() & other.keys()
    return sum(one[number] != other[number] for number in both), len(both)


def tokens_around(file: Path) -> list[str]:
    """What the tokenizer in a file puts around a text by itself; shards are made without it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    return list(tokenizer.encode("").tokens)


def train_tokenizer(corpus: Corpus, vocab_size: int, folder: Path) -> TokenizerInfo:
    """Trains on a balanced sample of every source's training text and writes the folder; the same text, the same file.

    A corpus that is too small for `vocab_size` gets reserved tokens up to it, so that the size is always as asked.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.train.vocab_size: {vocab_size}: expected at least {smallest} (bytes and specials)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    reserved = [AddedToken(f"<|reserved_{number}|>", special=True, normalized=False) for number in range(missing)]
    tokenizer.add_special_tokens(reserved)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(folder / "tokenizer.json", _with_visible_tags(tokenizer.to_str()))
    return read_tokenizer(folder)


def _with_visible_tags(serialized: str) -> str:
    content = json.loads(serialized)
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in SPECIAL_TOKENS or token["content"] in _HIDDEN
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _sample(corpus: Corpus) -> Iterator[str]:
    return (text for source in corpus.sources for text in sample_text(source, corpus, SAMPLE_BYTES))
