"""The Makefile hands on what a user gives it, and installs with the Pythons that setup.cfg promises."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def words(*arguments: str) -> list[str]:
    """The words of the one command that `make` would run."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


@pytest.mark.parametrize("name", ["plain", "two words", "it's", 'a "b" c', "a;b|c&d", "`a`", "(a)", "a\\b", "ä,ö"])
def test_names_reach_the_command_as_they_are(name: str) -> None:
    call = words("pretrain", "VENV=v", f"RECIPE={name}", f"RUN={name}", "NODES=2", "ARGS=--set a='b c'")
    assert call[-8:] == ["pretrain", name, "--nodes", "2", "--run", name, "--set", "a=b c"]
    assert words("docs-images", "VENV=v", f"RUN={name}")[-2] == f"runs/{name}/metrics.jsonl"


def test_a_name_with_a_quote_ends_with_2_and_one_line() -> None:
    command = ["make", "-s", "pretrain", f"VENV={sys.prefix}", "RECIPE=it's mine.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: it's mine.yaml: no such recipe or file")


def test_an_environment_may_lie_under_any_name(tmp_path: Path) -> None:
    environment = tmp_path / "it's my env"
    environment.symlink_to(sys.prefix)
    assert words("lint", f"VENV={environment}")[0] == f"{environment}/bin/ruff"
    command = ["make", "-s", "pretrain", f"VENV={environment}", "RECIPE=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none: no such recipe or file")


def test_posttrain_without_an_export_says_what_to_run_first() -> None:
    command = ["make", "-s", "-o", ".venv-posttraining/.ready", "posttrain", "RUN=no such run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/no such run has no export; run make pretrain first")


def test_the_pythons_of_the_makefile_are_those_that_setup_cfg_promises() -> None:
    tried = re.findall(r"python(3\.\d+)", (ROOT / "Makefile").read_text())
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    assert sorted(set(tried)) == sorted(promised)
