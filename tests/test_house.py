"""The rules of the house that no other tool looks after."""

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from launch.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ["nanotron_recipes", "parallel", "model", "data", "launch"]
MAX_LINES = 400


def own_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    if done.returncode != 0:  # an archive without history, or the clone of another user
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"git lists no files: {done.stderr.strip()}")
    listed = done.stdout.splitlines()
    suffixes = {".py", ".md", ".yaml", ".yml", ".cfg", ".toml", ".txt", ".sh", ""}
    return [ROOT / name for name in listed if (ROOT / name).is_file() and Path(name).suffix in suffixes]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def attributes_set_on_others(tree: ast.Module) -> Iterator[str]:
    """Yield `line: target` for each assignment to an attribute of something imported from nanotron or torch."""
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
            foreign.update(bound for name, bound in names if name.split(".")[0] in ("torch", "nanotron"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "nanotron"):
            foreign.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "…", ast.Store())]
        for target in targets:
            if isinstance(target, ast.Attribute) and root_name(target) in foreign:
                yield f"{target.value.lineno}: {ast.unparse(target)}"


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_imports_go_downwards_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "posttraining" / "src")}
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def imported_by(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Yield the modules that a file imports, also inside functions, but not for a type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (names | {str(node.module)}) & modules
        yield from imported_by(node, modules)


def test_no_two_files_need_each_other() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in own_files(*TOP_LEVEL)}
    needs = {module: set(imported_by(ast.parse(file.read_text()), set(files))) for module, file in files.items()}
    assert "data.parts" in needs["data.corpora"] and "data.user_text" in needs["data.corpora"], "one in a function"
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**needs, "data.text_part": {"data.parts"}}).prepare()


def test_package_init_files_are_empty() -> None:
    inits = [file for file in own_files(*TOP_LEVEL) if file.name == "__init__.py"]
    assert len(inits) >= len(TOP_LEVEL)
    assert [str(file) for file in inits if file.read_text().strip()] == []


def test_every_package_is_installed_by_name() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    packages = [file.parent for file in own_files(*TOP_LEVEL) if file.name == "__init__.py"]
    found = {".".join(folder.relative_to(ROOT).parts) for folder in packages}
    assert sorted(listed) == sorted(found)
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in own_files(*TOP_LEVEL)}
    assert folders == found, "a folder with modules needs an __init__.py"


def test_every_requirement_is_pinned() -> None:
    options = setup_cfg()["options"]["install_requires"] + setup_cfg()["options.extras_require"]["dev"]
    names = {re.split(r"[ <>=!~\[]", line, maxsplit=1)[0].lower() for line in options.split("\n") if line}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert sorted(names - {pin.split("==")[0].lower() for pin in pins}) == []


def test_tests_are_no_packages_and_have_unique_names() -> None:
    files = own_files("tests")
    assert [str(file) for file in files if file.name == "__init__.py"] == []
    names = [file.name for file in files if file.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_only_parallel_changes_nanotron_or_torch() -> None:
    offences = [
        f"{file.relative_to(ROOT)}:{found}"
        for file in own_files(*TOP_LEVEL, "benchmarks")
        if file.relative_to(ROOT).parts[0] != "parallel"
        for found in attributes_set_on_others(ast.parse(file.read_text()))
    ]
    assert [found for found in offences if "torch.backends." not in found] == []
    assert len({found.split(":")[0] for found in offences}) <= 1, "torch.backends is set in one place"


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.add = 1",
        "import torch.distributed as dist; dist.ReduceOp.AVG = dist.ReduceOp.SUM",
        "from nanotron.parallel import x; x.y.z = 1",
        "from nanotron import distributed as dist; setattr(dist, 'all_reduce', None)",
        "import nanotron; del nanotron.a.b",
        "from torch import nn; nn.Linear.forward: object = None",
    ],
)
def test_the_scan_for_changes_finds(line: str) -> None:
    assert list(attributes_set_on_others(ast.parse(line)))


def test_the_scan_for_changes_leaves_own_attributes_alone() -> None:
    own = "import torch\ndef f(self):\n  self.weight = torch.ones(1)\n  self.weight.grad = None"
    assert list(attributes_set_on_others(ast.parse(own))) == []


def test_files_can_be_held_in_mind() -> None:
    files = own_files(*TOP_LEVEL, "posttraining", "tests", "benchmarks")
    lengths = {file: len(file.read_text().splitlines()) for file in files}
    assert {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_no_file_names_a_machines_own_paths() -> None:
    """Published files, kept as they are to be read by tests, are not ours to change."""
    pattern = re.compile(r"(?<![\w.~}])/(?:home|root|work|mnt|scratch|fsx|Users|admin)/\w|(?<![\w.~}])/tmp/\w")
    offences = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in text_files()
        if "fixtures" not in file.parts
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert offences == []


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A working directory whose `data` and `model` packages must not be imported instead of ours."""
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported from the working directory')")
    return tmp_path


def run_in(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_packages_in_the_working_directory_do_not_shadow_ours_in_a_command(hostile_folder: Path, command: str) -> None:
    result = run_in(hostile_folder, Path(sys.executable).with_name("nanotron-recipes"), *command.split(), "--help")
    assert result.returncode == 0 and command in result.stdout, result.stderr


@pytest.mark.skipif(not (ROOT / "launch" / "train" / "__main__.py").exists(), reason="comes with the training loop")
def test_packages_in_the_working_directory_do_not_shadow_ours_in_a_rank(hostile_folder: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    result = run_in(hostile_folder, torchrun, "--standalone", "--nproc-per-node=1", "-m", "launch.train", "--help")
    assert result.returncode == 0 and "RECIPE" in result.stdout, result.stderr


def test_plain_folders_in_the_working_directory_do_not_shadow_ours(tmp_path: Path) -> None:
    for name in ("data", "model", "launch"):
        (tmp_path / name).mkdir()
    result = run_in(tmp_path, sys.executable, "-c", "import data, model, launch; print(data.__file__)")
    assert result.stdout == f"{ROOT / 'data' / '__init__.py'}\n", result.stderr


def test_both_distributions_have_the_same_lighteval() -> None:
    """They share its environment; what else it needs was found once."""
    ours, theirs = (ROOT / name for name in ("launch/evaluate/lighteval.txt", "posttraining/lighteval.txt"))
    assert ours.read_text() == theirs.read_text()
