"""What lies where in a run's folder, and which run a launch starts or goes on with."""

import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Literal

from launch.train.run_header import RunHeader
from launch.train.run_lock import MUTEX_FILE, RunIsTrained, RunLock, holder_of
from nanotron_recipes.errors import UserError, show_value
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import is_checkpoint, is_count

NODE = "{node}"
"""Stands in `checkpoints.checkpoints_path` for the name of the node, where each has a folder of its own."""

OWNER_FILE = "owner.json"
"""Beside steps that lie elsewhere than in their run's folder: whose they are (`launch.train.checkpoint_owner`)."""

LATEST = "latest"
LATEST_EXPORT = "latest-export"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. Making one of these touches no file."""

    path: Path
    """`runs/<name>`."""
    checkpoints: Path
    """Where `<step>/` folders lie: inside `path`, or in `<checkpoints_path>/<name>` where the recipe sets that key.
    Seen from no node in particular, `{node}` stands in it where the recipe has it."""

    @classmethod
    def of(cls, runs_dir: Path, name: str, recipe: Recipe, node: str | None = None) -> "RunFolder":
        """The folder of the run `name`; raises UserError when `name` cannot be a run's name.

        Args:
            node: the node from which checkpoints are seen; None: as a person sees them, those of all nodes.
        """
        path = runs_dir / checked_name(name)
        elsewhere = on_node(recipe.checkpoints.checkpoints_path, node)
        return cls(path, Path(elsewhere) / name if elsewhere else path / "checkpoints")

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a step or event."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """What ranks other than the first print, one folder a launch."""
        return self.path / "logs"

    @property
    def jobs(self) -> Path:
        """What was submitted to a cluster, one folder a submission."""
        return self.path / "jobs"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer that the run is trained with (`launch.train.run_tokenizer`)."""
        return self.path / "tokenizer"

    @property
    def export(self) -> Path:
        """The Hugging Face folder written after the last step."""
        return self.path / "export"

    def exists(self) -> bool:
        """Whether a run was started here: something has the name of its recipe, readable or not."""
        return os.path.lexists(self.recipe_file)

    def is_taken(self) -> bool:
        """Whether a new run may not have this name: something lies here that no launch left before it began."""
        if os.path.lexists(self.path) and (not self.path.is_dir() or self.exists() or not _is_free(self.path)):
            return True
        if self.jobs.is_dir() or self.steps():
            return True
        return any(os.path.lexists(place / OWNER_FILE) for place in self.checkpoint_folders())

    def create(self) -> None:
        """Make the folder; raises FileExistsError when another launch made it first, UserError where none can be."""
        for path in (self.path.parent, self.path):
            if os.path.lexists(path) and not path.is_dir():
                raise UserError(f"{path}: is not a folder; expected a free name or a folder of runs")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except FileExistsError:
            raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror})") from error

    def remove_unbegun(self) -> None:
        """Remove the folder that a launch has made and, refused, not begun a run in; anything else in it keeps it."""
        try:
            if not {entry.name for entry in self.path.iterdir()} <= {MUTEX_FILE, "checkpoints"}:
                return
            if self.checkpoints.parent == self.path and self.checkpoints.is_dir():
                self.checkpoints.rmdir()
            (self.path / MUTEX_FILE).unlink(missing_ok=True)
            self.path.rmdir()
        except OSError:  # not empty, or another's meanwhile
            return

    def write_recipe(self, recipe_yaml: str, header: RunHeader) -> None:
        """Write (or replace) recipe.yaml."""
        write_atomic(self.recipe_file, header.as_comments() + recipe_yaml)

    def header(self) -> RunHeader:
        """What stands above the recipe in recipe.yaml; raises UserError where that is no text."""
        return RunHeader.parse(_read_text(self.recipe_file))

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending. A checkpoint takes its name, the step, when it is whole."""
        folders = [folder for folder in self.checkpoint_folders() if folder.is_dir()]
        return sorted({int(entry.name) for folder in folders for entry in folder.iterdir() if is_checkpoint(entry)})

    def checkpoint_folders(self) -> list[Path]:
        """Where steps lie: one folder, or one for each node whose disk is seen from here."""
        return _seen(str(self.checkpoints))

    def step_folders(self, step: int) -> list[Path]:
        """The folders with files of one step's checkpoint, as far as they are seen from here."""
        found = [folder / str(step) for folder in self.checkpoint_folders()]
        return [folder for folder in found if folder.is_dir()] or found[:1] or [self.checkpoints / str(step)]

    def completed_step(self) -> int | None:
        """The step that the run ended with, when it did everything it had to; None while it is unfinished.

        Raises UserError where the mark is damaged.
        """
        if not os.path.lexists(self._completed_file):
            return None
        text = _read_text(self._completed_file)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        step = content.get("step") if isinstance(content, dict) else None
        if not is_count(step):
            raise UserError(
                f'{self._completed_file}: damaged: expected {{"step": N}}; without this file the run counts as '
                "unfinished, and the next launch does what is left"
            )
        return step

    @property
    def _completed_file(self) -> Path:
        return self.path / "completed"

    def mark_completed(self, step: int) -> None:
        """Note that nothing is left to do: trained up to `step`, exported and sampled where the recipe asks for it."""
        write_atomic(self._completed_file, json.dumps({"step": step}) + "\n")

    @property
    def failed_file(self) -> Path:
        """There when the newest launch gave up for a reason that a restart alone does not take away."""
        return self.path / "failed"

    def mark_failed(self, kind: str, step: int, message: str) -> None:
        """Note why the run ended: nothing should start it again before a person has looked."""
        write_atomic(self.failed_file, json.dumps({"kind": kind, "step": step, "message": message}) + "\n")

    def failure(self) -> str | None:
        """What `mark_failed` noted, in one line; None where the newest launch did not give up."""
        if not os.path.lexists(self.failed_file):
            return None
        try:
            return str(json.loads(_read_text(self.failed_file))["message"])
        except (UserError, ValueError, KeyError, TypeError, RecursionError):
            return f"{self.failed_file} is there"

    def forget_failure(self) -> None:
        """Take the mark of `mark_failed` away: somebody started the run again."""
        self.failed_file.unlink(missing_ok=True)

    def reopen(self) -> None:
        """Take the mark of `mark_completed` away: a longer training goes on."""
        self._completed_file.unlink(missing_ok=True)


def on_node(path: str | None, node: str | None) -> str | None:
    """A path of a recipe as a node has it."""
    return path if path is None or node is None else path.replace(NODE, node)


def _seen(path: str) -> list[Path]:
    """A path where it is one, and all that fit where `{node}` stands in it."""
    if NODE not in path:
        return [Path(path)]
    return [Path(found) for found in sorted(glob(escape(path).replace(NODE, "*")))]


@dataclass(frozen=True)
class RunChoice:
    """Which run a launch is about, and what is to be done with it."""

    folder: RunFolder
    """The run."""
    state: Literal["new", "resumed", "complete"]
    """`new`: nothing is there; `resumed`: unfinished, or asked to train longer; `complete`: nothing is left to do."""


Compatible = Callable[[RunFolder], bool]
"""Whether the recipe at hand changes nothing of what the unfinished run in a folder learns, past or later."""


def checked_name(name: str) -> str:
    """Return `name`; raises UserError when it cannot name a run."""
    if name in (LATEST, LATEST_EXPORT):
        raise UserError(f"--run {name}: this name is kept for the link to the newest run")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--run {show_value(name)}: expected 1 to 128 letters a to z, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )
    return name


def choose_run(
    runs_dir: Path, recipe_name: str, recipe: Recipe, run_name: str | None, is_compatible: Compatible
) -> RunChoice:
    """Choose the run of a launch, touching nothing.

    With `run_name`: that run. Without: the newest unfinished run of this recipe that was named like this,
    `<recipe name>-<number>`, that nobody trains and that `is_compatible`, else a new one: what comes later in a run is
    changed by its name alone, and so is a run gone on with that a person named. Raises UserError when `run_name` cannot
    be a run's name.
    """
    if run_name is not None:
        return _judge(RunFolder.of(runs_dir, run_name, recipe), recipe)
    unfinished = _unfinished_runs(runs_dir, recipe_name, recipe)
    for folder in sorted(unfinished, key=_last_touched, reverse=True):
        if _is_free(folder.path) and is_compatible(folder):
            return RunChoice(folder, "resumed")
    return RunChoice(RunFolder.of(runs_dir, _next_name(runs_dir, recipe_name, recipe), recipe), "new")


def first_name(recipe_name: str) -> str:
    """What `choose_run` calls the first run of a recipe."""
    return f"{_numbered(recipe_name)[0]}-1"


def take_run(
    runs_dir: Path, recipe_name: str, recipe: Recipe, run_name: str | None, is_compatible: Compatible, launch_id: str
) -> tuple[RunChoice, RunLock]:
    """Choose as `choose_run` does, make the folder if it is new, and take the run's lock.

    Two launches at the same moment get different runs, or the same named run goes to one of them.
    Raises UserError for a bad name and RunIsTrained when the named run is trained by another launch.
    """
    while True:
        choice = choose_run(runs_dir, recipe_name, recipe, run_name, is_compatible)
        try:
            if choice.state == "new" and not choice.folder.path.is_dir():
                choice.folder.create()
            lock = RunLock.acquire(choice.folder.path, launch_id)
            if _judge(choice.folder, recipe) == choice:
                return choice, lock
            lock.release()  # another launch had the run between the look and the lock
        except FileExistsError:
            continue
        except RunIsTrained:
            if run_name is not None:
                raise


def point_latest(runs_dir: Path, folder: RunFolder, link: str = LATEST) -> None:
    """Make `runs/latest` (or `runs/latest-export`) lead to a run, in one rename."""
    temporary = runs_dir / f".{link}.{secrets.token_hex(4)}"
    temporary.symlink_to(folder.name)
    try:
        os.replace(temporary, runs_dir / link)
    except OSError as error:
        temporary.unlink()
        raise UserError(f"{runs_dir / link}: expected a link to a run, which can be replaced") from error


def _judge(folder: RunFolder, recipe: Recipe) -> RunChoice:
    if not folder.exists():
        return RunChoice(folder, "new")
    completed = folder.completed_step()
    is_complete = completed is not None and completed >= recipe.tokens.train_steps
    return RunChoice(folder, "complete" if is_complete else "resumed")


def _unfinished_runs(runs_dir: Path, recipe_name: str, recipe: Recipe) -> list[RunFolder]:
    if not runs_dir.is_dir():
        return []
    _, pattern = _numbered(recipe_name)
    entries = [entry for entry in runs_dir.iterdir() if not entry.is_symlink() and pattern.fullmatch(entry.name)]
    folders = [RunFolder.of(runs_dir, entry.name, recipe) for entry in entries]
    return [folder for folder in folders if _is_unfinished(folder, recipe_name)]


def _is_unfinished(folder: RunFolder, recipe_name: str) -> bool:
    """Whether an unfinished run of the recipe is in there; what is damaged is of no concern to another run."""
    try:
        return folder.exists() and folder.header().recipe == recipe_name and folder.completed_step() is None
    except UserError:
        return False


def _is_free(path: Path) -> bool:
    """Whether nobody trains the run in a folder, as far as its holder's description can be read."""
    try:
        return holder_of(path) is None
    except UserError:
        return False


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged: not UTF-8 text") from error


def _last_touched(folder: RunFolder) -> float:
    files = [file for file in (folder.recipe_file, folder.metrics_file) if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _next_name(runs_dir: Path, recipe_name: str, recipe: Recipe) -> str:
    """The first `<recipe name>-<number>` above all that are taken. A folder without a recipe was never begun."""
    stem, pattern = _numbered(recipe_name)
    places = [place for place in (runs_dir, *_seen(recipe.checkpoints.checkpoints_path or "")) if place.is_dir()]
    matches = [match for place in places for entry in place.iterdir() if (match := pattern.fullmatch(entry.name))]
    taken = [int(match[1]) for match in matches if RunFolder.of(runs_dir, match[0], recipe).is_taken()]
    return f"{stem}-{max(taken, default=0) + 1}"


def _numbered(recipe_name: str) -> tuple[str, re.Pattern[str]]:
    """How runs are called that nobody gave a name: what stands before the number, and the whole."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe_name).lstrip("._-") or "run"
    return stem, re.compile(rf"{re.escape(stem)}-([0-9]{{1,9}})")
