"""A mapped file stays open, and a process may only have so many: a run of thousands of shards asks for more."""

import resource

from nanotron_recipes.errors import UserError

_OTHERS = 512
"""Files, sockets and libraries that a training opens besides."""


def allow_open_files(count: int) -> None:
    """Lets this process have `count` files open beside its others, as far as its hard limit goes; UserError beyond."""
    wanted = count + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"{count:,} files of shards are to be opened, and this process may open {hard:,} (ulimit -Hn); raise that "
            "limit, or tokenize into fewer, larger files"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
