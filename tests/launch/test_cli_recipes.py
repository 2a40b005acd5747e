"""list, show and validate as a user calls them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from launch.cli.main import COMMANDS, main
from launch.cli.options import local_path
from nanotron_recipes.loading import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
RUN = "from launch.cli.main import main; main()"


def run(*arguments: str, code: str = RUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


Called = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def called(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """Call the command line in this process; gives the exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["nanotron-recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capfd.readouterr())

    return call


def test_list_names_every_shipped_recipe_with_size_and_purpose() -> None:
    result = run("list")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: " ".join(line.split()) for line in result.stdout.splitlines()}
    assert lines["tiny"].startswith("tiny 361K 3.38M nothing ") and "laptop" in result.stdout
    assert lines["smollm3-3b"].startswith("smollm3-3b 3.08B 11.1T its data, a tokenizer ")


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
        "ranks on one node without GPUs: 2",
        "'decay stage': steps 793",
    ):
        assert fact in result.stderr


def test_show_says_which_ranks_a_job_on_some_nodes_has(called: Called) -> None:
    shown = called("show", "smollm3-3b", "--nodes", "48", "--gpus-per-node", "8")
    assert (
        shown[0] == 0
        and "ranks on 48 nodes of 8 GPUs: 384 = dp 192 × pp 1 × tp 2; micro-batches of each replica: " in shown[2]
    )
    assert shown[1] == called("show", "smollm3-3b")[1], "the recipe is the same"
    assert (
        "ranks on one node of 4 GPUs: 4 = dp 2 × pp 1 × tp 2" in called("show", "smollm3-3b", "--gpus-per-node", "4")[2]
    )
    code, _, err = called("show", "smollm3-3b", "--nodes", "5")
    assert code == 2 and err.startswith("error: --nodes 5: tokens.global_batch_size: ")


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
    assert (
        "context parallelism is not available yet" in result.stdout
        and "lighteval.output_dir: no effect" in result.stdout
    )


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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("show", "show: missing argument 'RECIPE'; see `nanotron-recipes show --help`"),
        ("validate", "validate: missing argument 'RECIPE…'; see `nanotron-recipes validate --help`"),
        ("export tiny-1", "export: missing argument 'OUT'; see `nanotron-recipes export --help`"),
        ("show tiny --sett a=b", "show: --sett: no such option; did you mean --set?"),
        ("show tiny --zzz", "show: --zzz: no such option; expected one of --set, --nodes, --gpus-per-node, --help"),
        ("--bogus", "--bogus: no such option; expected one of --version, --help"),
        ("checkpoints lst x", "'lst' is not one of 'list', 'verify', 'push', 'pull', 'prune'; did you mean list?"),
        (
            "pretrain tiny --launcher foo",
            "invalid value for '--launcher': 'foo' is not one of 'auto', 'local', 'slurm'",
        ),
        ("pretrain tiny --nodes x", "pretrain: invalid value for '--nodes': "),
        ("pretrain tiny --stop-after 0", "pretrain: invalid value for '--stop-after': "),
        ("show tiny more", "show: got unexpected extra argument(s) (more); see `nanotron-recipes show --help`"),
        ("show tiny --set", "option '--set' requires an argument"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: str, line: str, called: Called) -> None:
    code, out, err = called(*arguments.split())
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and line in err


def test_a_call_without_a_command_shows_help(called: Called) -> None:
    code, out, err = called()
    assert (code, err) == (2, "") and "verify-topology" in out


def test_the_version_is_shown(called: Called) -> None:
    assert called("--version") == (0, f"nanotron-recipes {version('nanotron-recipes')}\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "some/file"), "some/file: Permission denied"),
        (FileNotFoundError(2, "No such file or directory", b"some/file"), "some/file: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("this model\n is not there"), "this model is not there"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: OSError, line: str, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_recipe(*_: object) -> None:
        raise error

    monkeypatch.setattr("launch.cli.show.load_recipe", load_recipe)
    assert called("show", "tiny") == (2, "", f"error: {line}\n")


def test_a_deleted_working_directory_is_no_traceback(
    called: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped_recipes()["tiny"].read_text() + "typo: 1\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert called("validate", "tiny") == (0, "OK tiny\n", "")
    assert called("validate", str(copy))[2].startswith(f"error: {copy}:")
    assert called("checkpoints", "list", "tiny-1") == (
        2,
        "",
        "error: the working directory: No such file or directory\n",
    )


def test_a_name_that_no_file_can_have_is_refused(called: Called) -> None:
    code, _, err = called("show", "a" * 5000)
    assert code == 2 and err.endswith("…: cannot be looked up: File name too long\n") and len(err) < 400


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0 and f"nanotron-recipes {command}" in result.stdout.replace(
        "Usage: nanotron-recipes", ""
    )
    assert "Example" in result.stdout


def test_status_imports_no_torch() -> None:
    code = """
import sys
from launch.cli.main import main
sys.argv[1:] = ["status"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "nanotron", "transformers", "datatrove"}.intersection(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    assert run(code=code).returncode == 0


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


@pytest.mark.parametrize(("command", "first"), [("show tiny", "general:\n"), ("validate tiny", "OK tiny\n")])
def test_a_closed_pipe_ends_a_command_quietly(command: str, first: str) -> None:
    for lines, expected in ((1, first), (0, "")):
        shell = f"{sys.executable} -c '{RUN}' {command} 2>&1 | head -n {lines}"
        result = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert (result.stdout, result.stderr) == (expected, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_signs_is_no_traceback(encoding: str, tmp_path: Path) -> None:
    overrides = ["--set", "general.purpose=señal 信号"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (["list"], ["show", "tiny", *overrides], ["validate", "tiny", *overrides], ["validate", "信号"]):
        command = [sys.executable, "-c", RUN, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
        assert b"Traceback" not in result.stderr and result.returncode == (2 if arguments[1:] == ["信号"] else 0)
        if arguments[0] == "show":
            (tmp_path / "shown.yaml").write_bytes(result.stdout)
    shown = load_recipe(str(tmp_path / "shown.yaml")).recipe
    assert shown == load_recipe("tiny", overrides[1:]).recipe, "a recipe survives every encoding"


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_traceback(closed: str) -> None:
    for command in ("list", "show tiny", "validate tiny"):
        shell = f"{sys.executable} -c '{RUN}' {command} {closed}"
        result = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "Traceback" not in result.stderr


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


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("export", "run", "s3://a/b"), "OUT"),
        (("import", "hf://a", "b"), "HF_DIR"),
        (("import", "a", "s3://a/b"), "OUT"),
        (("data", "import-megatron", "a", "s3://a/b", "--tokenizer", "t"), "OUT"),
        (("data", "import-megatron", "a", "b", "--tokenizer", "s3://t"), "--tokenizer"),
        (("data", "plan", "tiny", "--plot", "s3://a/b.png"), "--plot"),
        (("data", "fertility", "tiny", "--tokenizer", "gs://t"), "--tokenizer"),
    ],
)
def test_a_url_is_no_folder_of_that_name(
    called: Called, arguments: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = called(*arguments)
    assert (
        code == 2 and f"invalid value for '{name}': " in said and "expected a path of this machine, not a URL" in said
    )
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x" and local_path("./~/x") == Path("~/x")
    with pytest.raises(typer.BadParameter, match="home folder is not known"):
        local_path("~nobody-of-that-name/x")
