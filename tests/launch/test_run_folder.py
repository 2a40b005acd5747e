import json
import os
import threading
from pathlib import Path

import pytest

from launch.train.run_choice import RunChoice, choose_run, point_latest, take_run
from launch.train.run_folder import LATEST_EXPORT, RunFolder
from launch.train.run_header import RunHeader
from launch.train.run_lock import RunIsTrained, RunLock
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.yaml_text import parse_yaml
from parallel.checkpoint_files import MANIFEST_FILE


def make_recipe(train_steps: int = 100, checkpoints_path: str | None = None) -> Recipe:
    return recipe_from_mapping(
        {
            "general": {"project": "test", "seed": 1},
            "model": {
                "model_config": {
                    "vocab_size": 64,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "max_position_embeddings": 32,
                },
                "init_method": {"std": 0.1},
            },
            "tokens": {
                "sequence_length": 32,
                "train_steps": train_steps,
                "micro_batch_size": 1,
                "global_batch_size": 2,
            },
            "checkpoints": {"checkpoints_path": checkpoints_path},
        }
    ).recipe


RECIPE = make_recipe()


def begin(
    runs: Path, name: str, *, recipe_name: str = "tiny", completed: int | None = None, age: float = 0
) -> RunFolder:
    folder = RunFolder.of(runs, name, RECIPE)
    folder.create()
    folder.write_recipe("general: {}\n", RunHeader(recipe_name, "0.1.0", "fingerprint"))
    if completed is not None:
        folder.mark_completed(completed)
    os.utime(folder.recipe_file, (1e9 - age, 1e9 - age))
    return folder


def choose(runs: Path, run_name: str | None = None, recipe: Recipe = RECIPE, fits: bool = True) -> tuple[str, str]:
    choice = choose_run(runs, "tiny", recipe, run_name, lambda folder: fits)
    return choice.folder.name, choice.state


def test_the_first_run_is_number_1_and_looking_makes_nothing(tmp_path: Path) -> None:
    assert choose(tmp_path / "runs") == ("tiny-1", "new")
    assert not (tmp_path / "runs").exists()


def test_a_complete_run_is_followed_by_the_next_number(tmp_path: Path) -> None:
    begin(tmp_path, "tiny-1", completed=100)
    begin(tmp_path, "tiny-3", completed=100)
    begin(tmp_path, "tiny-large-7", recipe_name="tiny-large")
    assert choose(tmp_path) == ("tiny-4", "new")


def test_the_newest_unfinished_run_of_the_recipe_that_nobody_named_goes_on(tmp_path: Path) -> None:
    begin(tmp_path, "tiny-1", age=50)
    begin(tmp_path, "tiny-2", age=30)
    begin(tmp_path, "mine", age=10)
    begin(tmp_path, "other-1", recipe_name="other")
    begin(tmp_path, "tiny-3", completed=100)
    assert choose(tmp_path) == ("tiny-2", "resumed")
    assert choose(tmp_path, "mine") == ("mine", "resumed")


def test_an_unfinished_run_that_is_trained_or_does_not_fit_is_no_candidate(tmp_path: Path) -> None:
    begin(tmp_path, "tiny-1", age=50)
    newer = begin(tmp_path, "tiny-2", age=10)
    with RunLock.acquire(newer.path, "another launch"):
        assert choose(tmp_path) == ("tiny-1", "resumed")
    assert choose(tmp_path, fits=False) == ("tiny-3", "new")


def test_a_folder_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny-1").mkdir()
    (tmp_path / "tiny-1" / "recipe.yaml").write_text("# notes\n")
    assert choose(tmp_path) == ("tiny-2", "new")


def test_a_named_run_is_new_resumed_or_complete(tmp_path: Path) -> None:
    assert choose(tmp_path, "first") == ("first", "new")
    folder = begin(tmp_path, "first")
    assert choose(tmp_path, "first") == ("first", "resumed")
    folder.mark_completed(100)
    assert choose(tmp_path, "first") == ("first", "complete")
    assert choose(tmp_path, "first", make_recipe(train_steps=200)) == ("first", "resumed")
    folder.reopen()
    assert choose(tmp_path, "first") == ("first", "resumed")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../up", "-x", ".hidden", "a b", "latest", "latest-export", "ä", "x" * 200]
)
def test_a_name_that_cannot_be_a_folder_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--run"):
        choose(tmp_path, name)


def test_a_recipes_file_name_becomes_a_runs_name(tmp_path: Path) -> None:
    assert choose_run(tmp_path, ".my recipe (2)", RECIPE, None, lambda folder: True).folder.name == "my-recipe-2--1"


def test_checkpoints_lie_elsewhere_where_the_recipe_says_so(tmp_path: Path) -> None:
    assert RunFolder.of(tmp_path, "a", RECIPE).checkpoints == tmp_path / "a" / "checkpoints"
    elsewhere = make_recipe(checkpoints_path=str(tmp_path / "nvme"))
    assert RunFolder.of(tmp_path, "a", elsewhere).checkpoints == tmp_path / "nvme" / "a"


def test_only_whole_checkpoints_count_as_steps(tmp_path: Path) -> None:
    folder = begin(tmp_path, "tiny-1")
    assert folder.steps() == []
    for name in ("0", "100", "20", "3.tmp", ".4", "007", "²", "٣", "+5", "latest"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / MANIFEST_FILE).touch()
    (folder.checkpoints / "30").mkdir()
    (folder.checkpoints / "40").touch()
    assert folder.steps() == [0, 20, 100]


def test_the_header_of_a_recipe_comes_back(tmp_path: Path) -> None:
    folder = begin(tmp_path, "tiny-1")
    header = RunHeader("tiny", "0.1.0+abc", "f" * 16, ("step 40: tokens.train_steps: 100 → 200", "step 60: a: # b: c"))
    folder.write_recipe("general:\n  project: x\n", header)
    assert folder.header() == header


@pytest.mark.parametrize(
    "text",
    ["n\nl", "a\nmodel: {}", "\r\n# run: x", "\x7f\x00\x85\u2028", '"quoted"', '"', "\udcff", "back\\nslash", " "],
)
def test_no_text_leaves_its_comment_in_a_recipes_header(tmp_path: Path, text: str) -> None:
    folder = begin(tmp_path / "runs", "tiny-1")
    header = RunHeader(text, text, text, (text, "other", text), text, text)
    folder.write_recipe("general:\n  project: x\n", header)
    assert folder.header() == header
    assert parse_yaml(folder.recipe_file.read_text(), "recipe.yaml") == {"general": {"project": "x"}}
    assert folder.recipe_file.read_text().endswith("\ngeneral:\n  project: x\n")


def test_links_follow_the_newest_run_and_survive_a_move_of_the_folder(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first, second = begin(runs, "tiny-1"), begin(runs, "tiny-2")
    point_latest(runs, first)
    point_latest(runs, second)
    point_latest(runs, first, LATEST_EXPORT)
    runs.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest").resolve() == tmp_path / "moved" / "tiny-2"
    assert (tmp_path / "moved" / "latest-export").resolve() == tmp_path / "moved" / "tiny-1"
    assert sorted(entry.name for entry in (tmp_path / "moved").iterdir()) == [
        "latest",
        "latest-export",
        "tiny-1",
        "tiny-2",
    ]


def test_a_folder_in_the_place_of_the_link_is_not_replaced(tmp_path: Path) -> None:
    folder = begin(tmp_path, "tiny-1")
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="expected a link"):
        point_latest(tmp_path, folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "tiny-1"]


def test_simultaneous_launches_get_different_runs(tmp_path: Path) -> None:
    taken: list[tuple[RunChoice, RunLock]] = []
    start = threading.Barrier(5)

    def take(number: int) -> None:
        start.wait()
        taken.append(take_run(tmp_path, "tiny", RECIPE, None, lambda folder: True, f"launch {number}"))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, lock in taken:
        lock.release()
    assert sorted(choice.folder.name for choice, _ in taken) == [f"tiny-{number}" for number in range(1, 6)]


def test_a_launch_that_ended_before_it_began_leaves_its_number_free(tmp_path: Path) -> None:
    choice, lock = take_run(tmp_path, "tiny", RECIPE, None, lambda folder: True, "first")
    lock.release()
    again, lock = take_run(tmp_path, "tiny", RECIPE, None, lambda folder: True, "second")
    lock.release()
    assert again == choice and again.state == "new"


def test_a_named_run_that_is_trained_is_refused(tmp_path: Path) -> None:
    _, lock = take_run(tmp_path, "tiny", RECIPE, "mine", lambda folder: True, "first")
    with pytest.raises(RunIsTrained, match="mine: process"):
        take_run(tmp_path, "tiny", RECIPE, "mine", lambda folder: True, "second")
    lock.release()


def test_why_a_run_gave_up_is_noted_until_it_is_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, tmp_path / "checkpoints")
    folder.forget_failure()
    folder.mark_failed("replicas", 7, "copies differ")
    assert json.loads(folder.failed_file.read_text()) == {"kind": "replicas", "step": 7, "message": "copies differ"}
    folder.forget_failure()
    assert not folder.failed_file.exists()


def test_a_file_where_a_run_would_lie_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    folder = RunFolder(tmp_path / "taken", tmp_path / "checkpoints")
    with pytest.raises(UserError, match="is not a folder"):
        folder.create()
