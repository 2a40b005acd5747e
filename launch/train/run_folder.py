"""What lies where in a run's folder."""

import json
import os
import re
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

from launch.train.run_header import RunHeader
from launch.train.run_lock import MUTEX_FILE, holder_of
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
"""Links to the newest run and to that of the newest export, which no run may be called like."""
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
        if os.path.lexists(self.path) and (not self.path.is_dir() or self.exists() or not is_free(self.path)):
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
        return seen_paths(str(self.checkpoints))

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


def seen_paths(path: str) -> list[Path]:
    """A path where it is one, and all that fit where `{node}` stands in it."""
    if NODE not in path:
        return [Path(path)]
    return [Path(found) for found in sorted(glob(escape(path).replace(NODE, "*")))]


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


def is_free(path: Path) -> bool:
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
