"""How the files of a source are shared: big ones are cut into parts, parts are dealt to shards.

What a shard holds follows from the files alone, never from how many workers there are. A jsonl file is cut by bytes: a
part has the lines that begin in it. A parquet file is cut between row groups. A packed jsonl file cannot be cut.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from data.text_files import TextFiles
from data.text_part import Part

MOST_SHARDS = 256
"""More would only be more files to open."""
PART_BYTES = 1 << 23
"""Files are cut into parts of about this size, or into as many as there may be shards: a few seconds of encoding, so
that workers end together also where there is little text."""


def is_packed(file: str) -> bool:
    """Whether a file can only be read from its start, by its name."""
    return file.endswith((".gz", ".zst"))


def _can_be_cut(reader: str, file: str) -> bool:
    return reader == "parquet" or (reader == "jsonl" and not is_packed(file))


def shares_of(reader: str, text: TextFiles, text_key: str) -> list[list[Part]]:
    """The parts of each shard. Read one after the other they are the files in their order."""
    part_bytes = max(PART_BYTES, ceil(sum(file.size for file in text.files) / MOST_SHARDS))
    parts: list[Part] = []
    for whole in whole_files(text):
        if whole.size <= part_bytes or not _can_be_cut(reader, whole.file) or len(text.files) >= MOST_SHARDS:
            parts.append(whole)
        elif reader == "jsonl":
            parts += _cut_lines(whole, part_bytes)
        else:
            parts += _cut_row_groups(whole, part_bytes, text_key)
    return deal(parts, MOST_SHARDS)


def whole_files(text: TextFiles) -> list[Part]:
    """Each file as one part."""
    return [Part(folder=text.folder, file=file.name, size=file.size) for file in text.files]


def _cut_lines(whole: Part, part_bytes: int) -> list[Part]:
    count = ceil(whole.size / part_bytes)
    bounds = [whole.size * number // count for number in range(count + 1)]
    return [
        whole.model_copy(update={"size": end - first, "first": first, "end": end}) for first, end in pairwise(bounds)
    ]


def _cut_row_groups(whole: Part, part_bytes: int, text_key: str) -> list[Part]:
    from data.user_text import row_group_sizes

    groups = row_group_sizes(whole, text_key)
    scale = whole.size / max(1, sum(groups))
    parts: list[Part] = []
    first, size = 0, 0
    for group, group_bytes in enumerate(groups):
        size += round(group_bytes * scale)
        if size >= part_bytes or group == len(groups) - 1:
            parts.append(whole.model_copy(update={"size": size, "first": first, "end": group + 1}))
            first, size = group + 1, 0
    return parts or [whole]


def deal(parts: Sequence[Part], shards: int) -> list[list[Part]]:
    """Neighbouring parts go to the same shard, of which there are at most `shards`, all about as large."""
    if len(parts) <= shards:
        return [[part] for part in parts]
    total = max(1, sum(part.size for part in parts))
    shares: list[list[Part]] = [[] for _ in range(shards)]
    before = 0
    for part in parts:
        shares[min(shards - 1, (2 * before + part.size) * shards // (2 * total))].append(part)
        before += part.size
    return [share for share in shares if share]
