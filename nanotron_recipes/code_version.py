"""Which code this is: the version, and the commit of the clone it lies in."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSION_FILE = "code-version.txt"
"""In a copy of the code that is no clone: what `code_version` said of the clone that it was made from."""
_GIT_SECONDS = 10


def code_version() -> str:
    """Return `0.1.0 (commit 1234567)`, with `, modified` where files of the clone differ from it; without git or a
    clone the version alone."""
    root = Path(__file__).resolve().parents[1]
    try:
        return (root / VERSION_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        pass
    try:
        found = version("nanotron-recipes")
    except PackageNotFoundError:  # run from a copy that was never installed
        found = "unknown version"
    commit = _git(root, "rev-parse", "--short", "HEAD") if (root / ".git").exists() else ""
    if not commit:
        return found
    changed = ", modified" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    return f"{found} (commit {commit}{changed})"


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
