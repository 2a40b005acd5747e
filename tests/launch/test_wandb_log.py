"""Records for wandb: what is refused before a run begins, what ends none, and which run there is gone on with."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_pretraining import REPOSITORY, StartProcess, pretrain_command
from test_metrics import step_record

from data.plan import DataPlan
from launch.train.callbacks import make_callbacks
from launch.train.loop import Launch
from launch.train.metrics import validation_event
from launch.train.preflight import check_recipe_to_the_end
from launch.train.prepare import RunRequest, prepare_run
from launch.train.signals import StopRequest
from launch.train.wandb_log import Wandb
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_disks import Disks

ERRORS = """
class Error(Exception): pass
class CommError(Error): pass
class AuthenticationError(CommError): pass
class UsageError(Error): pass
"""
NO_KEY = "No API key configured. Use `wandb login` to log in."


class Run:
    """A run of wandb that takes points while it is well."""

    def __init__(self) -> None:
        self.is_well = True
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.finish()
        self.steps.append(step)

    def finish(self) -> None:
        if not self.is_well:
            raise RuntimeError("the service\nhas gone")


Plant = Callable[..., SimpleNamespace]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Let `import wandb` give a module with these functions, and its errors."""

    def call(**functions: Any) -> SimpleNamespace:
        errors: dict[str, Any] = {}
        exec(ERRORS, errors)
        module = SimpleNamespace(errors=SimpleNamespace(**errors), **functions)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return call


def raising(error: Exception) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        raise error

    return call


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'nanotron-recipes\[wandb\]'"):
        Wandb(tmp_path, "project", "tiny-1", "a0", {})


@pytest.mark.parametrize("name", ["UsageError", "AuthenticationError"])
def test_an_account_that_is_missing_is_said_before_the_run_begins_and_by_the_rank(
    name: str, plant: Plant, tmp_path: Path
) -> None:
    recipe = load_recipe("tiny", ["logging.wandb=true", "checkpoints.export_at_end=false"]).recipe
    module = plant()
    module.login = module.init = raising(getattr(module.errors, name)(NO_KEY))
    said = r"^logging.wandb: true: No API key configured. Use `wandb login` to log in; or set WANDB_MODE=offline, or "
    with pytest.raises(UserError, match=said):
        check_recipe_to_the_end(recipe)
    with pytest.raises(UserError, match=said):
        Wandb(tmp_path, "project", "tiny-1", "a0", {})
    module.login = lambda **arguments: False  # as in offline mode
    check_recipe_to_the_end(recipe)


def test_a_server_that_does_not_answer_ends_nothing(plant: Plant, tmp_path: Path) -> None:
    module, said = plant(), list[str]()
    module.init = raising(module.errors.CommError("Failed to get resume status:\nconnection refused"))
    wandb = Wandb(tmp_path, "project", "tiny-1", "a0", {}, said.append)
    wandb.on_step(step_record(1))
    wandb.close()
    assert said == ["wandb: Failed to get resume status: connection refused; training goes on without new points there"]


def test_a_service_that_fails_later_ends_nothing(plant: Plant, tmp_path: Path) -> None:
    run, said = Run(), list[str]()
    plant(init=lambda **arguments: run)
    wandb = Wandb(tmp_path, "project", "tiny-1", "a0", {}, said.append)
    for step in range(1, 6):
        run.is_well = step not in (2, 3)
        wandb.on_step(step_record(step))
    run.is_well = False
    wandb.on_event(validation_event(5, {"code": 1.0}))
    wandb.close()
    assert run.steps == [1, 4, 5]
    assert said == [
        "wandb: the service has gone; training goes on without new points there",
        "wandb: it takes new points again",
    ]


def test_a_run_goes_on_in_its_own_run_of_wandb_and_another_of_its_name_does_not(
    small_file: Path, tmp_path: Path, plant: Plant
) -> None:
    begun: list[tuple[str, str]] = []
    plant(login=lambda **arguments: True, init=lambda **arguments: begun.append((arguments["name"], arguments["id"])))
    loaded = load_recipe(str(small_file), ["logging.wandb=true"])
    for runs in ("here", "here", "there"):
        prepared = prepare_run(RunRequest(loaded, "mine", tmp_path / runs))
        prepared.lock.release()
        launch = Launch(
            prepared.folder,
            prepared.recipe,
            DataPlan.from_recipe(prepared.recipe),
            1,
            None,
            None,
            {},
            Disks((0,), ("a",), 0),
        )
        for callback in make_callbacks(launch, StopRequest(), is_job=False):
            callback.close()
    assert begun[0] == begun[1] != begun[2]
    assert [name for name, _ in begun] == ["mine"] * 3


def test_a_rank_without_an_account_ends_the_launch_in_one_line(
    small_file: Path, tmp_path: Path, start_process: StartProcess
) -> None:
    """While the other rank waits in a collective."""
    package = tmp_path / "path" / "wandb"
    package.mkdir(parents=True)
    (package / "errors.py").write_text(ERRORS)
    (package / "__init__.py").write_text(
        "from wandb import errors\n"
        "def login(**arguments): return True\n"
        f"def init(**arguments): raise errors.UsageError({NO_KEY!r})\n"
    )
    command = pretrain_command(small_file, "--run", "mine", "--set", "logging.wandb=true")
    code, _, err = start_process(command, tmp_path, PYTHONPATH=f"{package.parent}:{REPOSITORY}").end()
    assert code == 2
    assert err == (
        "error: logging.wandb: true: No API key configured. Use `wandb login` to log in; or set WANDB_MODE=offline, "
        "or leave it out\n"
    )
