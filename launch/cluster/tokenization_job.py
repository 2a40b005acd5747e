"""`tokenize` as a job of one or several nodes."""

import sys
from collections.abc import Iterator
from pathlib import Path

from launch.cluster.sbatch import check_prologue, render
from launch.cluster.slurm import require_sbatch, submit_script
from launch.cluster.snapshot import job_recipe, take_snapshot
from nanotron_recipes.cluster_profiles import job_resources
from nanotron_recipes.errors import UserError, one_line
from nanotron_recipes.files import write_atomic
from nanotron_recipes.loading import LoadedRecipe, dump_yaml
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.variables import require_variables


def script_for(loaded: LoadedRecipe, nodes: int, workers: int | None) -> str:
    """The script, from the recipe alone; nothing is written. Raises UserError."""
    folder = _corpus_folder(loaded.recipe, loaded.name) / "jobs" / "1"
    return _render(loaded, folder, folder / f"{loaded.name}.yaml", nodes, workers)


def submit_tokenization(loaded: LoadedRecipe, nodes: int, workers: int | None) -> Iterator[str]:
    """Submit it with a copy of recipe and code; yields what a person should know. Raises UserError."""
    require_sbatch()
    require_variables(loaded.recipe)
    folder = take_snapshot(_corpus_folder(loaded.recipe, loaded.name), loaded.name, dump_yaml(loaded.recipe))
    script = folder / "job.sh"
    write_atomic(script, _render(loaded, folder, job_recipe(folder), nodes, workers))
    job = submit_script(script, f"tokenize-{loaded.name}")
    yield f"submitted: job {job}, {nodes} node{'s' * (nodes > 1)}"
    yield f"log:       tail -F {folder}/slurm-{job}.log"
    yield f"next:      squeue --job {job}"


def _corpus_folder(recipe: Recipe, name: str) -> Path:
    if recipe.corpus is None:
        raise UserError(f"{name}: corpus: missing; there is nothing to tokenize")
    assert recipe.corpus.path is not None, "loading a recipe fills it in"
    return Path(recipe.corpus.path)


def _render(loaded: LoadedRecipe, folder: Path, recipe: Path, nodes: int, workers: int | None) -> str:
    resources, _ = job_resources(loaded.recipe)
    check_prologue(resources.prologue)
    return render(
        "tokenize.sh.jinja",
        name=one_line(loaded.name),
        recipe=recipe,
        folder=folder,
        nodes=nodes,
        resources=resources.model_dump(),
        python=sys.executable,
        workers="" if workers is None else f" --workers {workers}",
    )
