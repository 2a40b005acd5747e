"""The code and the recipe of a submission, in the run's folder: a job runs what was submitted."""

import secrets
import shutil
from pathlib import Path

from nanotron_recipes.code_version import VERSION_FILE, code_version
from nanotron_recipes.errors import UserError

PACKAGES = ("nanotron_recipes", "parallel", "model", "data", "launch")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def take_snapshot(run: Path, recipe_name: str, recipe_yaml: str) -> Path:
    """Put the code at hand and a recipe into the next free `<run>/jobs/<number>`; returns that folder.

    It has `code/<package>/…` and `<recipe name>.yaml`. Raises UserError where the folder cannot be written.
    """
    jobs = run / "jobs"
    beside = jobs / f".{secrets.token_hex(4)}"
    clone = Path(__file__).resolve().parents[2]
    try:
        for package in PACKAGES:
            shutil.copytree(clone / package, beside / "code" / package, ignore=_LEFT_OUT)
        (beside / "code" / VERSION_FILE).write_text(code_version() + "\n", encoding="utf-8")
        (beside / f"{recipe_name}.yaml").write_text(recipe_yaml, encoding="utf-8")
        return _take_number(jobs, beside)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"{jobs}: the job's code and recipe cannot be written: {error}") from error


def job_recipe(folder: Path) -> Path:
    """The recipe in a submission's folder. Raises UserError where there is none."""
    found = sorted(folder.glob("*.yaml"))
    if len(found) != 1:
        raise UserError(f"{folder}: expected the folder of a submission, with one recipe and the code")
    return found[0]


def _take_number(jobs: Path, beside: Path) -> Path:
    taken = [int(entry.name) for entry in jobs.iterdir() if entry.name.isascii() and entry.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:  # another submission of the same moment may take it
        try:
            return beside.rename(jobs / str(number))
        except OSError:
            if not (jobs / str(number)).exists():
                raise
            number += 1
