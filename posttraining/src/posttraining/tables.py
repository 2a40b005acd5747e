"""Tables on a terminal."""

from rich.console import Console
from rich.markdown import Markdown

_WIDEST = 100
"""Columns where nobody says how many there are, as in a job's log."""


def show_tables(markdown: str) -> None:
    """Draw the tables of a report, which are markdown in its files."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDEST)
    console.print(Markdown(markdown))
