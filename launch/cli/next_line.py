"""What to call next, as it can be pasted into a shell."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path


def tool(name: str) -> str:
    """A command of this environment: by its path, quoted, where the environment is not on PATH."""
    here = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(here) or not here.exists():
        return name
    try:
        return shlex.quote(str(here.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(here))


def command(name: str, *arguments: str | Path) -> str:
    """A call of a command of this environment."""
    return " ".join([tool(name), *(shlex.quote(str(argument)) for argument in arguments)])


def generation_command(folder: Path, prompt: str) -> str:
    """A line of Python that lets the exported model in `folder` go on with a prompt, encoded as its text was."""
    from data.tokenizer import tokens_around

    file = folder / "tokenizer.json"
    without = ", add_special_tokens=False" if file.is_file() and tokens_around(file) else ""
    return _python(
        f"from transformers import pipeline; print(pipeline('text-generation', {str(folder)!r})({prompt!r}{without}))"
    )


def loading_command(folder: Path) -> str:
    """A line of Python that loads an exported model that has no tokenizer."""
    return _python(f"from transformers import AutoModel; print(AutoModel.from_pretrained({str(folder)!r}))")


def _python(code: str) -> str:
    """In double quotes, which leave single ones readable, where the shell changes nothing inside them."""
    quoted = shlex.quote(code) if re.search(r'["$`!]|\\\\', code) else f'"{code}"'
    return f"{tool('python')} -c {quoted}"
