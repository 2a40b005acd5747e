"""The documentation is true: its commands run, its links lead somewhere, its tables and generated pages are the code's.

Every shell command in README.md, CONTRIBUTING.md and docs/ is run here (`RUN_HERE`), or by what `RUN_ELSEWHERE` names.
"""

import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.train.prepare import check_trainable
from model.arithmetic import num_parameters
from nanotron_recipes.key_reference import PAGE_FILE, key_reference
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import local_world_size, resolve_topology

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COUNTS_OF_TORCHRUN = ("--nnodes", "--nproc-per-node")
LANGUAGES = {"sh", "text", "yaml", "python", "mermaid"}

SHORTENED = " --set tokens.train_steps=2 --set checkpoints.export_at_end=false"
RUN_HERE = {
    ". .venv/bin/activate": "",
    "nanotron-recipes --help": "",
    "nanotron-recipes list": "",
    "nanotron-recipes show tiny": "",
    "nanotron-recipes show tiny > mine.yaml": "",
    "nanotron-recipes validate mine.yaml": "",
    "nanotron-recipes validate tiny smollm3-3b": "",
    "nanotron-recipes validate my.yaml": "",
    "nanotron-recipes tokenize my.yaml": "",
    "nanotron-recipes verify-topology my.yaml --steps 3": "",
    "nanotron-recipes pretrain my.yaml": SHORTENED,
    "nanotron-recipes data plan my.yaml --plot data.png": "",
    "nanotron-recipes data show my.yaml --step 1": "",
    "nanotron-recipes data verify my.yaml": "",
    "nanotron-recipes data fertility my.yaml --tokenizer corpora/my/tokenizer": "",
    "nanotron-recipes status": "",
    "nanotron-recipes status runs/latest": "",
    "nanotron-recipes status runs/latest --watch": "",
    "nanotron-recipes status runs/latest --json": "",
    "nanotron-recipes evaluate runs/latest": "",
    "nanotron-recipes checkpoints list runs/latest": "",
    "nanotron-recipes checkpoints verify runs/latest": "",
    "nanotron-recipes checkpoints prune runs/latest --dry-run": "",
    "python -m launch.train.loss_plot runs/latest/metrics.jsonl loss.png": "",
}
"""Commands in the order in which they are run, in one new folder, each with what is added to it."""

TINY = "tests/launch/test_tiny.py::test_it_says_what_it_reached_and_where_everything_is"
PRETRAIN = "tests/launch/test_pretrain.py::"
EXPORT = "tests/launch/test_cli_export.py::test_import_then_export_gives_the_folder_back"
STORE = "tests/launch/test_s3_cli.py::"
SLURM = "tests/cluster/test_pretrain_on_slurm.py::"
RUN_ELSEWHERE = {
    "nanotron-recipes pretrain smollm3-3b --nodes 8 --dry-run": (
        "tests/launch/test_submit.py::test_the_command_prints_the_script_alone_to_stdout"
    ),
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr host0 --master-port 29500 -m launch.train -- "
    "tiny --run by-hand": f"{SLURM}test_hosts_without_slurm_train_one_run",
    "nanotron-recipes tokenize my.yaml --launcher slurm --nodes 2": (
        "tests/cluster/test_tokenize_on_slurm.py::test_two_nodes_make_the_shards_of_one_machine"
    ),
    "make pretrain": TINY,
    "make pretrain NODES=8": "tests/test_docs.py::test_eight_nodes_without_slurm_end_with_2_and_say_why",
    "make posttrain": "tests/test_docs.py::test_make_posttrain_gives_the_export_of_the_run_to_the_pipeline",
    "make test": ".ci/run: make test",
    'make test ARGS="tests/nanotron_recipes -x"': ".ci/run: make test",
    "make lint": ".ci/run: make lint",
    "nanotron-recipes data stage smollm3-3b --set variables.SMOLLM3_DATA=s3://bucket/smollm3 --set "
    "data_staging.path=/nvme": "tests/data/test_stage_command.py::"
    "test_a_store_is_read_with_the_recipes_endpoint_and_refusals_are_one_line",
    "make docs": "tests/test_docs.py::test_make_docs_writes_the_generated_pages",
    "make docs-images RUN=readme": "tests/test_docs.py::test_make_docs_images_is_the_command_that_draws_a_run",
    "nanotron-recipes pretrain tiny": TINY,
    "nanotron-recipes pretrain tiny --run mine --stop-after 100": (
        f"{PRETRAIN}test_stops_save_and_a_run_goes_on_at_another_topology"
    ),
    "nanotron-recipes pretrain tiny --run mine": f"{PRETRAIN}test_stops_save_and_a_run_goes_on_at_another_topology",
    "torchrun --nproc-per-node 2 -m launch.train -- tiny --run by-hand": (
        f"{PRETRAIN}test_a_run_records_every_step_every_validation_and_its_start"
    ),
    "nanotron-recipes verify-topology tiny --topology dp=2,pp=2": (
        "tests/launch/test_verify_topology.py::"
        "test_the_command_trains_on_the_recipes_data_and_says_that_topologies_agree"
    ),
    "nanotron-recipes pretrain tiny --launcher local --node-names a,b --set checkpoints.checkpoints_path=ssd/{node}": (
        "tests/launch/test_nodes.py::test_a_run_goes_on_at_other_topologies_on_other_nodes_and_names_what_was_lost"
    ),
    "nanotron-recipes pretrain tiny --run decayed --set checkpoints.resume_checkpoint_path=runs/mine/checkpoints/100": (
        "tests/launch/test_saver.py::test_a_branch_goes_on_from_any_checkpoint_at_another_topology"
    ),
    "nanotron-recipes data import-megatron megatron/web_text_document corpora/web --tokenizer my-tokenizer": (
        "tests/data/test_megatron.py::test_the_command_makes_a_folder_that_a_run_reads"
    ),
    "nanotron-recipes checkpoints push runs/latest": f"{STORE}test_what_is_missing_is_pushed_and_seen_in_the_list",
    "nanotron-recipes checkpoints pull runs/latest": f"{STORE}test_the_newest_step_or_a_named_one_is_pulled",
    "nanotron-recipes export runs/latest my-model --verify": EXPORT,
    "nanotron-recipes import my-model imported": EXPORT,
}
"""Commands and what runs them: a test, or a stage of .ci/run."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def table_below(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its own head."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[0].splitlines()[2:]]


def environment() -> dict[str, str]:
    """What a user has who has taken the environment in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def bash(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", "-c", command],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def suggestions() -> list[str]:
    """The options that the README suggests to change first."""
    return [arguments.strip("`") for _, arguments in table_below(README, "What to change first")]


def changed(arguments: str) -> Recipe:
    parts = shlex.split(arguments)
    assert set(parts[::2]) == {"--set"}, arguments
    return load_recipe("tiny", parts[1::2]).recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_by_something(page: Path) -> None:
    unknown = [command for command in commands(page) if command not in RUN_HERE and command not in RUN_ELSEWHERE]
    assert unknown == [], "run them here, or name the test that does"
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES and set(fences[1::2]) <= {""}


def test_no_command_is_kept_that_no_page_has() -> None:
    documented = {command for page in PAGES for command in commands(page)}
    assert (RUN_HERE.keys() | RUN_ELSEWHERE.keys()) - documented == set()


@pytest.mark.parametrize("target", sorted(set(RUN_ELSEWHERE.values())))
def test_what_runs_a_command_exists(target: str) -> None:
    if target.startswith(".ci/run: "):
        assert target.removeprefix(".ci/run: ") in (ROOT / ".ci/run").read_text().splitlines()
    else:
        file, name = target.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()


def test_a_recipe_can_be_trained_on_the_ranks_that_torchrun_is_told_to_start() -> None:
    found = [shlex.split(line) for page in PAGES for line in commands(page) if line.startswith("torchrun ")]
    assert len(found) >= 2
    for words in found:
        counts = [int(words[words.index(option) + 1]) if option in words else 1 for option in COUNTS_OF_TORCHRUN]
        recipe = load_recipe(words[words.index("--") + 1]).recipe
        assert resolve_topology(recipe, math.prod(counts)).world_size == math.prod(counts)


def test_commands_run_one_after_the_other_in_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "my.yaml").write_text(blocks(ROOT / "docs/data.md", "yaml")[0])
    shutil.copytree(ROOT / "docs", tmp_path / "my-texts", ignore=shutil.ignore_patterns("images"))
    for command, added in RUN_HERE.items():
        done = bash(command + added, tmp_path)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert load_recipe(str(tmp_path / "mine.yaml")).recipe == load_recipe("tiny").recipe
    assert (tmp_path / "loss.png").is_file()


def test_eight_nodes_without_slurm_end_with_2_and_say_why(tmp_path: Path) -> None:
    for tool in ("make", "env", "sh", "bash"):  # a machine on which sbatch would be found must not submit a job
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = bash(f"make pretrain NODES=8 VENV={shlex.quote(sys.prefix)}", ROOT, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "sbatch is missing" in done.stderr and "Traceback" not in done.stderr


def test_make_pretrain_is_the_command_that_the_tiny_test_runs() -> None:
    assert shlex.split(bash("make -n pretrain VENV=v", ROOT).stdout)[-2:] == ["pretrain", "tiny"]
    with_options = bash('make -n pretrain VENV=v RUN=a ARGS="--set general.seed=7"', ROOT).stdout
    assert shlex.split(with_options)[-6:] == ["pretrain", "tiny", "--run", "a", "--set", "general.seed=7"]


def test_make_posttrain_gives_the_export_of_the_run_to_the_pipeline(tmp_path: Path) -> None:
    """The pipeline itself is what `make test-posttraining` runs."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "../.venv-posttraining/.ready"):
        file = tmp_path / "posttraining" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    program = tmp_path / ".venv-posttraining/bin/posttraining"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    refused = bash("make posttrain", tmp_path)
    assert refused.returncode == 2 and "error: runs/latest-export has no export; run make pretrain" in refused.stderr
    (tmp_path / "runs/tiny-7/export").mkdir(parents=True)
    (tmp_path / "runs/latest-export").symlink_to("tiny-7")
    for options, added in (("", []), ('RUN=tiny-7 ARGS="--set a=b"', ["--set", "a=b"])):
        told = bash(f"make posttrain {options}", tmp_path).stdout.splitlines()
        settings = ["--set", "model=runs/tiny-7/export", "--set", "output_dir=runs/tiny-7/posttraining"]
        assert told == ["pipeline", "tiny", *settings, *added]


def test_make_docs_writes_the_generated_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [shlex.split(line)[-1] for line in bash("make -n docs VENV=v", ROOT).stdout.splitlines()]
    assert modules == ["nanotron_recipes.key_reference", "parallel.adaptations"]
    for module, name in zip(modules, ("PAGE_FILE", "TABLE_FILE"), strict=True):
        written = importlib.import_module(module)
        page = Path(getattr(written, name))
        monkeypatch.setattr(written, name, tmp_path / page.name)
        written.main()
        assert (tmp_path / page.name).read_text() == page.read_text(), "make docs"


def test_make_docs_images_is_the_command_that_draws_a_run() -> None:
    """`RUN_HERE` has that command."""
    drawn = shlex.split(bash("make -n docs-images RUN=readme VENV=v", ROOT).stdout)
    assert drawn[-4:] == ["-m", "launch.train.loss_plot", "runs/readme/metrics.jsonl", "docs/images/tiny-loss.png"]


def test_ci_has_what_the_tests_need_and_skips_none_for_the_lack_of_it() -> None:
    lines = [line.partition(" #")[0] for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert lines.index("export CI=1") < lines.index("make cluster-tools") < lines.index("make test")


@pytest.mark.parametrize("arguments", suggestions())
def test_a_suggested_change_can_be_trained(arguments: str) -> None:
    recipe = changed(arguments)
    check_trainable(recipe)
    resolve_topology(recipe, local_world_size(recipe))
    assert recipe != load_recipe("tiny").recipe


@pytest.mark.long
def test_a_step_is_trained_with_every_suggested_change(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    for number, arguments in enumerate(suggestions()):
        done = bash(f"nanotron-recipes pretrain tiny --run row-{number} --stop-after 1 {arguments}", tmp_path)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        assert (tmp_path / f"runs/row-{number}/checkpoints/1").is_dir()


def test_the_table_of_nodes_is_what_the_recipe_resolves_to() -> None:
    recipe = load_recipe("smollm3-3b").recipe
    rows = table_below(README, "The same recipe on 8 nodes")
    assert len(rows) >= 3
    for nodes, dp, pp, tp, cut, tokens in rows:
        topology = resolve_topology(recipe, local_world_size(recipe, recipe.slurm.gpus_per_node, int(nodes)))
        assert (topology.dp, topology.pp, topology.tp) == (int(dp), int(pp), int(tp))
        assert f"{topology.num_micro_batches} of {topology.micro_batch_size}" == cut
        assert f"{topology.global_batch_size * recipe.tokens.sequence_length:,}" == tokens


@pytest.mark.parametrize("name", ["tiny", "smollm3-3b"])
def test_the_readme_knows_how_large_the_models_are(name: str) -> None:
    assert f"{num_parameters(load_recipe(name).recipe):,}" in README.read_text()


def test_generated_pages_are_fresh() -> None:
    from parallel.adaptations import TABLE_FILE, render_table

    assert PAGE_FILE.read_text() == key_reference(), "make docs"
    assert TABLE_FILE.read_text() == render_table(), "make docs"


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
    for test in re.findall(r"`(tests/[\w/]+\.py::\w+)`", text):
        file_name, name = test.split("::")
        assert f"def {name}(" in (ROOT / file_name).read_text(), f"{page.name}: {test}"
