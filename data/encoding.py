"""datatrove's DocumentTokenizer for documents of any length: long ones are encoded piece by piece.

An encoding takes some 140 bytes of memory a character: one document of 100 MB in one piece would take 14 GB.
Imports datatrove: import this module where a shard is made, not before.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer, TokenizedFile
from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 19
"""Longest piece of a document that is encoded at once."""
_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 256
_CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
"""The space between two words: every usual pre-tokenizer cuts before it, so that the tokens stay the same."""
_CUT_WITHIN = 1 << 12


class DocumentEncoder(DocumentTokenizer):
    """Writes the tokens of whole documents, an end-of-document token after each, and shuffles them.

    What the tokenizer's file says about truncation, padding and special tokens around a text has no effect.
    """

    def __init__(
        self,
        folder: str,
        tokenizer_file: str,
        *,
        scratch: str,
        eos_token: str,
        token_bytes: int,
        seed: int,
        made: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        """`token_bytes` is the size of a token in the shards, 2 or 4; `scratch` a folder for unshuffled tokens; `made`
        is told how many tokens each batch has given."""
        super().__init__(folder, tokenizer_file, local_working_dir=scratch, seed=seed)
        self._eos_token = eos_token
        self._made = made
        self.token_size = token_bytes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; every text is encoded as a whole."""
        return _loaded(self.tokenizer_name_or_path)

    def write_unshuffled(self, data: DocumentsPipeline, filename: str) -> TokenizedFile:
        """Writes the documents' tokens in their order, to be shuffled."""
        file = TokenizedFile(
            self.local_working_dir,
            filename,
            tokenizer_name_or_path=self.tokenizer_name_or_path,
            save_final_metadata=self.save_final_metadata,
            token_size=self.token_size,
        )
        end = [self.tokenizer.token_to_id(self._eos_token)]
        dtype = f"<u{self.token_size}"
        for batch in batches_of(document.text for document in data):
            encoded = self.tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            before = file.write_idx
            for (_, is_last), encoding in zip(batch, encoded, strict=True):
                tokens = np.array(encoding.ids + end if is_last else encoding.ids, dtype=dtype)
                # Without document ends of its own, a call ends one document.
                file.write_bytes(tokens.tobytes(), doc_ends=None if is_last else [])
            self._made(file.write_idx - before)
        file.close()
        return file


@lru_cache(maxsize=1)
def _loaded(file: str) -> Tokenizer:
    """Once a process, not once a shard: loading a large vocabulary takes as long as encoding a megabyte."""
    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pieces_of(text: str, limit: int) -> Iterator[str]:
    """Cuts a text into pieces of at most `limit` characters, between two words where it can."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        cuts = [cut.start() for cut in _CUT.finditer(text, max(start + 1, end - _CUT_WITHIN), end)]
        end = cuts[-1] if cuts else end
        yield text[start:end]
        start = end
    yield text[start:]


def batches_of(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents that are encoded together, each with whether it is its document's last: 256 at most, of no
    more than two million characters."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        pieces = list(pieces_of(text, PIECE_CHARACTERS))
        for number, piece in enumerate(pieces, start=1):
            if batch and (len(batch) == _BATCH_PIECES or characters + len(piece) > _BATCH_CHARACTERS):
                yield batch
                batch, characters = [], 0
            batch.append((piece, number == len(pieces)))
            characters += len(piece)
    if batch:
        yield batch
