"""The package stands alone, and its commands say what they do."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import posttraining
from posttraining.cli import app, main

BLOCKED = ("nanotron", "nanotron_recipes", "parallel", "model", "data", "launch")

BLOCK = f"""
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is absent here")
sys.meta_path.insert(0, Blocked())
import posttraining
names = [one.name for one in pkgutil.walk_packages(posttraining.__path__, "posttraining.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""

HELP = """
import sys
from posttraining.cli import main
try:
    main(["--help"])
finally:
    print([name for name in ("torch", "trl", "transformers") if name in sys.modules])
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder where nothing of the repository lies."""
    environment = {**os.environ, "PYTHONPATH": str(Path(posttraining.__file__).parents[1])}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_every_module_imports_where_the_rest_of_the_repository_is_absent(tmp_path: Path) -> None:
    done = python(BLOCK, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list(pkgutil.walk_packages(posttraining.__path__, "posttraining.")))


def test_help_needs_neither_torch_nor_trl(tmp_path: Path) -> None:
    done = python(HELP, tmp_path)
    assert done.stdout.endswith("[]\n")


COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    assert f"Example: posttraining {command} " in " ".join(capsys.readouterr().out.split())
