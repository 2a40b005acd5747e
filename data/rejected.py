"""What a corpus holds but cannot be used: counted and named, never skipped in silence."""

from collections import Counter
from dataclasses import dataclass, field

MAX_EXAMPLES = 3


@dataclass
class Rejected:
    """Lines and documents that were left out of one reading of a source."""

    counts: Counter[str] = field(default_factory=Counter)
    """How many, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few places (`file:line`) by reason."""
    keys_seen: set[str] = field(default_factory=set)
    """Keys of objects that had no text under the text_key."""

    def add(self, reason: str, where: str) -> None:
        """Notes one more."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(where)
