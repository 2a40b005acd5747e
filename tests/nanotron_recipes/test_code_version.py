"""A run says which code it was trained with."""

import shutil
import subprocess
import sys
from pathlib import Path

import nanotron_recipes.code_version as code_version_module


def said_by(copy: Path) -> str:
    """What a copy of the code says of itself."""
    command = [sys.executable, "-P", "-c", "from nanotron_recipes.code_version import code_version as v; print(v())"]
    environment = {"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_clone_names_its_commit_and_whether_it_was_edited(tmp_path: Path) -> None:
    package = tmp_path / "nanotron_recipes"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(code_version_module.__file__, package)
    version = said_by(tmp_path)
    assert "commit" not in version

    def git(*words: str) -> str:
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "nanotron_recipes/__init__.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert said_by(tmp_path) == f"{version} (commit {commit})"
    (package / "__init__.py").write_text("# edited\n")
    assert said_by(tmp_path) == f"{version} (commit {commit}, modified)"
    (tmp_path / code_version_module.VERSION_FILE).write_text("0.1.0 (commit 1234567)\n")
    assert said_by(tmp_path) == "0.1.0 (commit 1234567)"
