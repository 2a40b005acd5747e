"""list, show and validate as a user calls them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli.main import COMMANDS
from nanotron_recipes.loading import load_recipe

ROOT = Path(__file__).parents[2]
RUN = "from launch.cli.main import main; main()"


def run(*arguments: str, code: str = RUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_list_names_every_shipped_recipe_with_size_and_purpose() -> None:
    result = run("list")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "361K" in lines["tiny"] and "3.38M" in lines["tiny"] and "laptop" in lines["tiny"]
    assert "3.08B" in lines["smollm3-3b"] and "11.1T" in lines["smollm3-3b"]


def test_show_prints_a_recipe_that_reads_back_and_the_facts_beside_it(tmp_path: Path) -> None:
    result = run("show", "tiny", "--set", "tokens.train_steps=1000", "--set", "general.run=x")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "shown.yaml"
    path.write_text(result.stdout)
    shown = load_recipe(str(path)).recipe
    assert shown == load_recipe("tiny", ["tokens.train_steps=1000", "general.run=x"]).recipe
    for fact in (
        "parameters: 361,280",
        "note: general.run: no effect",
        "ranks on one node: 2",
        "'decay stage': steps 793",
    ):
        assert fact in result.stderr


def test_validate_looks_at_all_and_exits_with_2_where_one_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("general: {}\n")
    result = run("validate", "tiny", str(bad), "smollm3-3b")
    assert result.returncode == 2
    ok = [line for line in result.stdout.splitlines() if line.startswith("OK")]
    assert ok == ["OK tiny", "OK smollm3-3b (3 notes)"] and "${" not in result.stderr
    assert result.stderr.splitlines() == [f"error: {bad}: model: missing; this key has no default"]
    assert run("validate", "tiny", "smollm3-3b").returncode == 0


def test_validate_prints_the_notes_of_a_published_file() -> None:
    result = run("validate", "tests/nanotron_recipes/fixtures/smollm3-long_64k.yaml")
    assert result.returncode == 0
    assert "context parallelism is not available yet" in result.stdout and "lighteval: no effect" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "tniy"], "did you mean tiny?"),
        (["show", "tiny", "--set", "tokens.trian_steps=3"], "did you mean train_steps?"),
        (["valdate", "tiny"], "did you mean validate?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


@pytest.mark.parametrize("arguments", [["show"], ["show", "tiny", "--sett", "a=b"], ["validate"]])
def test_a_wrong_call_exits_with_2_and_without_a_traceback(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0 and f"nanotron-recipes {command}" in result.stdout.replace(
        "Usage: nanotron-recipes", ""
    )
    assert "Example" in result.stdout


def test_the_quick_commands_import_nothing_heavy() -> None:
    code = """
import sys
from launch.cli.main import main
for arguments in (["--help"], ["list"], ["show", "tiny"], ["validate", "tiny"]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
heavy = {"torch", "nanotron", "transformers", "datatrove", "numpy"}.intersection(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = run(code=code)
    assert result.returncode == 0, result.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -c '{RUN}' show tiny | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "general:\n" and "Traceback" not in result.stderr


def test_ctrl_c_exits_with_130() -> None:
    code = """
import time
import launch.cli.main, launch.cli.show
launch.cli.show.load_recipe = lambda *_: (print("up", flush=True), time.sleep(60))
launch.cli.main.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "show", "tiny"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
