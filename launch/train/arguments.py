"""Command lines of the modules that are started with `python -m`: a wrong call is one line, as everywhere."""

import argparse
from typing import NoReturn

from nanotron_recipes.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong call."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse, which would print the usage as well."""
        raise UserError(f"{' '.join(message.split())}; see `python -m {self.prog} --help`")


def step_number(text: str) -> int:
    """The type of an argument that is a step."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a step, from 1 on")
    return int(text)
