"""Every mistake of a user ends with 2 and one line that names the place and what was expected; nothing is started."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import REPOSITORY, StartProcess, pretrain_command, write_recipe

from launch.cli.main import main
from launch.cluster.local import torchrun_arguments
from launch.train.prepare import PreparedRun, RunRequest, prepare_run
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_files import Manifest, write_manifest

Change = Callable[[dict[str, Any], Path], None]
Refuse = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Call the command line in `tmp_path`; it must refuse in one line, which is returned without `error: `."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, command: str = "pretrain") -> str:
        monkeypatch.setattr(sys, "argv", ["nanotron-recipes", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert ended.value.code == 2, captured
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ") and "starting 2 ranks" not in captured.out
        return line.removeprefix("error: ")

    return call


def _set(key: str, value: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        section = recipe
        *sections, name = key.split(".")
        for each in sections:
            section = section[each]
        section[name] = value

    return change


def _both(*changes: Change) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        for each in changes:
            each(recipe, folder)

    return change


def _source_is(content: str | None) -> Change:
    """The first source reads a file with this content, or one that is not there."""

    def change(recipe: dict[str, Any], folder: Path) -> None:
        file = folder / "mine.jsonl"
        if content is not None:
            file.write_text(content)
        recipe["corpus"] |= {"path": str(folder / "corpus")}
        recipe["corpus"]["sources"][0]["path"] = str(file)

    return change


def _first_stage_reads(folder: str) -> Change:
    """There is one stage, and it reads shards from a folder of that path."""
    stage = {"name": "one", "start_training_step": 1, "data": {"dataset": {"dataset_folder": [folder]}}}
    return _set("data_stages", [stage])


RECIPES: dict[str, tuple[Change, list[str]]] = {
    "a misspelt key": (
        _set("optimizer.wieght_decay", 0.1),
        ["small.yaml", "optimizer.wieght_decay", "did you mean weight_decay?"],
    ),
    "a misspelt section": (_set("tokns", {}), ["small.yaml", "tokns", "did you mean tokens?"]),
    "attention heads that tp does not divide": (
        _both(_set("parallelism.tp", 8), _set("parallelism.tp_mode", "ALL_REDUCE")),
        ["parallelism.tp", "8", "num_attention_heads 4"],
    ),
    "kv heads that tp does not divide": (
        _set("parallelism.tp", 4),
        ["parallelism.tp", "4", "num_key_value_heads 2", "expected one of 1, 2"],
    ),
    "a sequence that tp does not divide": (
        _both(_set("tokens.sequence_length", 63), _set("parallelism.tp", 2)),
        ["tokens.sequence_length", "63", "multiple of tp 2", "REDUCE_SCATTER"],
    ),
    "too few micro-batches for 1f1b": (
        _both(_set("parallelism.pp", 4), _set("tokens.micro_batch_size", 12)),
        ["parallelism.pp", "4", "1f1b", "micro-batches", "afab"],
    ),
    "a weight-decay pattern that matches nothing": (
        _set("optimizer.weight_decay_exclude_named_params", [".*token_embeding.*"]),
        ["weight_decay_exclude_named_params", "token_embeding", "matches no parameter"],
    ),
    "context parallelism": (
        _set("parallelism.context_parallel_size", 4),
        ["small.yaml", "parallelism.context_parallel_size", "4", "not available yet"],
    ),
    "a batch that dp does not divide": (_set("parallelism.dp", 5), ["tokens.global_batch_size", "24", "dp 5"]),
    "text that is not there": (_source_is(None), ["corpus.sources", "words", "mine.jsonl"]),
    "an empty corpus": (_source_is(""), ["corpus.sources", "words", "no document in there"]),
    "text under another key": (_source_is('{"txt": "some"}\n'), ["text_key", "did you mean txt?"]),
    "shards that are not there": (
        _set(
            "data_stages", [{"name": "one", "start_training_step": 1, "data": {"dataset": {"dataset_folder": ["no"]}}}]
        ),
        ["dataset_folder", "no: no such folder", "tokenize"],
    ),
    "shards of a larger vocabulary": (
        _both(
            _first_stage_reads("small/corpus/words"),
            _set("model.model_config.vocab_size", 256),
            _set("tokenizer", {}),
            _set("corpus", None),
        ),
        ["model.model_config.vocab_size", "256", "320"],
    ),
    "a tokenizer of a larger vocabulary": (
        _set("model.model_config.vocab_size", 256),
        ["model.model_config.vocab_size", "256", "320"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_in_a_recipe_is_one_line(
    name: str, refused: Refuse, small_mapping: dict[str, Any], small_folder: Path, tmp_path: Path
) -> None:
    change, expected = RECIPES[name]
    (tmp_path / "small").symlink_to(small_folder)
    change(small_mapping, tmp_path)
    line = refused(write_recipe(tmp_path / "small.yaml", small_mapping))
    missing = [word for word in expected if word not in line]
    assert not missing, line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("suffix", [".ds", ".ds.index"])
def test_a_truncated_shard_is_named(
    suffix: str, refused: Refuse, small_mapping: dict[str, Any], small_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_folder / "corpus", tmp_path / "corpus")
    small_mapping["corpus"]["path"] = "corpus"
    file = next((tmp_path / "corpus" / "numbers").glob(f"*{suffix}"))
    file.write_bytes(file.read_bytes()[:-8])
    line = refused(write_recipe(tmp_path / "small.yaml", small_mapping))
    assert str(file.relative_to(tmp_path)) in line and "bytes" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("general: {project: [}\n", ["small.yaml", "line 1"]),
        ("- a list\n", ["small.yaml", "expected a recipe"]),
        ("", ["small.yaml"]),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text: str, expected: list[str], refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(text)
    line = refused("small.yaml")
    assert all(word in line for word in expected), line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tinny"], ["tinny", "did you mean tiny?"]),
        ([""], ["'': expected the name of a shipped recipe, or a path"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such recipe or file"]),
        (["tiny", "--set", "tokens.train_step=3"], ["--set", "tokens.train_step", "did you mean train_steps?"]),
        (["tiny", "--set", "tokens.train_steps"], ["--set", "tokens.train_steps", "="]),
        (["tiny", "--set", "tokens.train_steps=many"], ["--set", "tokens.train_steps", "many"]),
        (["tiny", "--run", "../elsewhere"], ["--run", "../elsewhere"]),
        (["tiny", "--run", "n" * 300], [f"--run '{'n' * 58}…: expected 1 to 128 letters a to z, digits, "]),
        (["tiny", "--run", ".."], ["--run '..': expected", "beginning with a letter or digit"]),
        (["tiny", "--run", "latest"], ["--run", "latest"]),
        (["smollm3-3b", "--nodes", "8"], ["sbatch is missing", "login node", "NODES="]),
        (
            ["tiny", "--set", "parallelism.dp=100000", "--set", "tokens.global_batch_size=100000"],
            ["100,000 ranks", "for each of its CPUs"],
        ),
        (["tiny", "--set", "general.cpu_ranks_per_node=1000000"], ["1,000,000 ranks", "expected at most"]),
        (["tiny", "--gpus-per-node", "3", "--set", "parallelism.dp=2"], ["--gpus-per-node 3", "dp 2", "that is 2"]),
    ],
)
def test_a_mistake_in_an_argument_is_one_line(
    arguments: list[str], expected: list[str], refused: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(*arguments)
    missing = [word for word in expected if word not in line]
    assert not missing, line


@pytest.fixture
def begun(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedRun:
    """A run of the small recipe called `begun`, with a checkpoint of step 8, that this process holds."""
    monkeypatch.chdir(tmp_path)
    prepared = prepare_run(RunRequest(load_recipe(str(small_file)), "begun"))
    write_manifest(prepared.folder.checkpoints / "8", Manifest(8, "", {}, ()))
    return prepared


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optimizer.learning_rate_scheduler.learning_rate=0.01", ["learning_rate", "0.005 → 0.01"]),
        ("general.seed=4", ["general.seed", "3 → 4"]),
        ("tokens.global_batch_size=48", ["tokens.global_batch_size", "24 → 48"]),
        ("model.dtype=bfloat16", ["model.dtype"]),
        ("data_stages.0.data.dataset.dataset_weights=[0.5, 0.5]", ["data_stages.0", "dataset_weights"]),
        ("tokens.train_steps=7", ["tokens.train_steps", "40 → 7"]),
    ],
)
def test_a_resume_that_changes_the_past_is_refused_and_changes_nothing(
    change: str, expected: list[str], refused: Refuse, begun: PreparedRun, small_file: Path
) -> None:
    begun.lock.release()
    before = begun.folder.recipe_file.read_bytes()
    line = refused(small_file, "--run", "begun", "--set", change)
    assert line.startswith("runs/begun: ") and "after step 8" in line and "--run" in line
    missing = [word for word in expected if word not in line]
    assert not missing, line
    assert begun.folder.recipe_file.read_bytes() == before


def test_a_run_that_another_process_trains_is_refused(refused: Refuse, begun: PreparedRun, small_file: Path) -> None:
    with begun.lock:
        line = refused(small_file, "--run", "begun")
    assert line.startswith(f"runs/begun: process {begun.lock.holder.pid} on ") and "--run" in line


def test_a_damaged_recipe_of_another_run_is_in_nobodys_way(begun: PreparedRun, small_file: Path) -> None:
    begun.lock.release()
    begun.folder.recipe_file.write_text("# recipe: small\nno: recipe\n")
    fresh = prepare_run(RunRequest(load_recipe(str(small_file))))
    fresh.lock.release()
    assert (fresh.folder.name, fresh.state) == ("small-1", "new")


def test_a_world_that_is_not_dp_pp_tp_is_refused_by_the_ranks(
    small_mapping: dict[str, Any], start_process: StartProcess, tmp_path: Path
) -> None:
    small_mapping["parallelism"] |= {"dp": 2, "tp": 2}
    file = write_recipe(tmp_path / "small.yaml", small_mapping)
    torchrun = torchrun_arguments("launch.train", ["--", str(file), "--run", "three"], 3, tmp_path / "logs", "three")
    command = [sys.executable, "-P", "-m", "launch.cluster.agent", *torchrun]
    code, out, err = start_process(command, tmp_path).end()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: parallelism.dp: 2: ") and "4 ranks, and 3 were started" in line
    assert not (tmp_path / "runs").exists()


def test_a_rank_without_torchrun_says_how_to_start_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "tiny"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "torchrun --nproc-per-node 2 -m launch.train -- RECIPE" in line


def test_a_recipe_whose_name_is_too_long_for_a_run_is_refused(
    refused: Refuse, small_mapping: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path / f"{'n' * 200}.yaml", small_mapping)
    assert "expected a name of at most 100 characters, or --run NAME" in refused(file)
    assert not (tmp_path / "runs").exists()
    assert "--run" in refused(file, "--run", "n" * 200)


def test_topologies_of_more_ranks_than_the_machine_bears_are_not_compared(refused: Refuse) -> None:
    line = refused("tiny", "--topology", "dp=1200", command="verify-topology")
    assert "1,200 ranks" in line and "expected at most" in line


def test_the_command_itself_ends_with_2_and_one_line(start_process: StartProcess, tmp_path: Path) -> None:
    code, out, err = start_process(pretrain_command("tiny", "--set", "tokns.train_steps=3"), tmp_path).end()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("did you mean tokens?\n") and err.count("\n") == 1
