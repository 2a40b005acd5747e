"""What a corpus holds but cannot be used: counted and named, never skipped in silence. And how far a reading is."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NOT_JSON = "not a JSON object"
NO_TEXT = "no text under the text_key"
EMPTY = "empty text"
NOT_UTF8 = "not UTF-8"
NO_UNICODE = "text with half of a surrogate pair"
MAX_EXAMPLES = 3
_MAX_KEYS = 100


@dataclass
class Rejected:
    """Lines and documents that were left out of one reading of a source."""

    counts: Counter[str] = field(default_factory=Counter)
    """How many, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few places (`file:line`) by reason."""
    keys_seen: set[str] = field(default_factory=set)
    """Some keys of objects that lack the text_key."""
    bytes_read: int = 0
    """Bytes of the files, packed as they are, that are behind the reading."""

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Notes `count` more."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(where)

    def see_keys(self, keys: Iterable[str]) -> None:
        """Notes what stands where the text_key was looked for."""
        if len(self.keys_seen) < _MAX_KEYS:
            self.keys_seen.update(key.encode(errors="replace").decode() for key in keys)
