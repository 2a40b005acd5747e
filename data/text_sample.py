"""A sample of a source's training text: what a tokenizer is trained on, and what tokenizers are compared on."""

from collections.abc import Iterator
from math import ceil

from data.corpora import documents, shards_of
from data.rejected import Rejected
from data.text_part import Part
from nanotron_recipes.schema.data import Corpus, CorpusSource

_STREAMS = 32
"""So many places of a source at most are read from: each costs a look ahead, of text on S3 some MB."""
_DOCUMENT_CHARACTERS = 50_000
"""Of a document no more is taken: one long one shall not stand for its source."""


def sample_text(
    source: CorpusSource, corpus: Corpus, num_bytes: int, rejected: Rejected | None = None
) -> Iterator[str]:
    """Texts that `tokenize` trains on, of `num_bytes` of UTF-8 or a little more (fewer where there are fewer), one by
    one from places all over the source; `rejected` gets what cannot be used.

    Raises UserError as `documents` does.
    """
    shards = _shards(source)
    streams = [
        documents(source, corpus, "train", shard=shard, shards=len(shards), parts=parts, rejected=rejected)
        for shard, parts in list(enumerate(shards))[:: ceil(len(shards) / _STREAMS)]
    ]
    left = num_bytes
    for text in _in_turn(streams):
        yield text[:_DOCUMENT_CHARACTERS]
        left -= len(text[:_DOCUMENT_CHARACTERS].encode("utf-8", errors="replace"))
        if left <= 0:
            break


def _shards(source: CorpusSource) -> list[list[Part]]:
    """Those of the corpus; of text that comes with Python more, where all of it belongs to the corpus."""
    is_whole_library = source.reader.startswith("python") and source.documents is None
    return [[]] * _STREAMS if is_whole_library else shards_of(source)


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text
