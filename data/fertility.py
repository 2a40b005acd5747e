"""How many tokens a tokenizer makes of text: what a choice between tokenizers goes by."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.rejected import Rejected
from data.text_sample import sample_text
from data.tokenization import empty_source
from data.tokenizer import TokenizerInfo
from nanotron_recipes.schema.data import Corpus, CorpusSource

_BATCH = 64


@dataclass(frozen=True)
class Fertility:
    """Sums over a sample of a source's training text."""

    documents: int
    text_bytes: int
    """UTF-8."""
    words: int
    """Stretches between white space."""
    tokens: int
    """Without special tokens."""

    @property
    def tokens_per_word(self) -> float:
        """Fertility (Ács 2019); of little meaning where words are not written apart."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for."""
        return self.text_bytes / max(1, self.tokens)

    def __add__(self, other: "Fertility") -> "Fertility":
        return Fertility(
            self.documents + other.documents,
            self.text_bytes + other.text_bytes,
            self.words + other.words,
            self.tokens + other.tokens,
        )


def sample(source: CorpusSource, corpus: Corpus, num_bytes: int) -> list[str]:
    """Training texts of a source of about `num_bytes`, from places all over it.

    Raises UserError where the source cannot be read or has no text.
    """
    rejected = Rejected()
    texts = list(sample_text(source, corpus, num_bytes, rejected))
    if not texts:
        raise empty_source(source, rejected)
    return texts


def fertility(texts: Iterable[str], tokenizer: TokenizerInfo) -> Fertility:
    """Encodes the texts as `tokenize` does, without the end-of-document tokens."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer.file))
    encoder.no_truncation()
    encoder.no_padding()
    texts = list(texts)
    tokens = 0
    for first in range(0, len(texts), _BATCH):
        encoded = encoder.encode_batch_fast(texts[first : first + _BATCH], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encoded)
    return Fertility(
        documents=len(texts),
        text_bytes=sum(len(text.encode("utf-8", errors="replace")) for text in texts),
        words=sum(len(text.split()) for text in texts),
        tokens=tokens,
    )


def distinct_names(folders: list[Path]) -> list[str]:
    """A short name for each folder: its last part, as many parts as tell it from the others."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
