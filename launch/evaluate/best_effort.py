"""What a run is complete without."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Where the body fails, a line on stderr says that `what` failed and why, and the rest goes on."""
    try:
        yield
    except Exception as error:
        print(f"{what}: failed ({type(error).__name__}: {' '.join(str(error).split())})", file=sys.stderr)
