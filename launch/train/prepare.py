"""Before anything is started: the data is there, the run is chosen, its past fits, its folder is ours."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from data.plan import DataPlan
from data.repetition import repetition_notes
from data.tokenization import look_at_text
from launch.storage.look import look_into_store
from launch.train.branch import Branch, check_branch
from launch.train.checkpoint_owner import refuse_what_others_have
from launch.train.preflight import check_places, check_recipe_to_the_end
from launch.train.resume import DataThrough, newest_sound_step, parent_checkpoint, require_data
from launch.train.run_choice import point_latest, take_run
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader, new_run_id
from launch.train.run_lock import RunLock, new_launch_id
from launch.train.run_tokenizer import keep_tokenizer
from nanotron_recipes.code_version import code_version
from nanotron_recipes.errors import UserError
from nanotron_recipes.frozen import Change, changes_of_the_past, later_changes
from nanotron_recipes.loading import LoadedRecipe, dump_yaml, load_recipe
from nanotron_recipes.numbers import counted
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.skipped import keep_ranges
from nanotron_recipes.unsupported import unsupported_features
from nanotron_recipes.variables import require_variables

RUNS = Path("runs")
"""Where runs lie, relative to the working directory."""


@dataclass(frozen=True)
class RunRequest:
    """What a user asked for.

    Attributes:
        loaded: the recipe with its overrides.
        run_name: `--run`, or None to choose.
        launch_id: what this launch is called; None: a new name.
    """

    loaded: LoadedRecipe
    run_name: str | None = None
    runs_dir: Path = RUNS
    launch_id: str | None = None


@dataclass(frozen=True)
class PreparedRun:
    """A run that this launch may train.

    Attributes:
        state: `new`, `resumed`, or `complete` (nothing is left to do).
        step: what it goes on from: the newest checkpoint, or the one it branched off; 0 without one.
        changes: what a resume changes in the run's future, one line each.
        notes: what a person should know about the data before the first step, one line each.
    """

    folder: RunFolder
    recipe: Recipe
    state: Literal["new", "resumed", "complete"]
    step: int
    launch_id: str
    lock: RunLock = field(repr=False)
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_trainable(recipe: Recipe, source: str = "recipe") -> None:
    """Raise UserError for a recipe that `validate` accepts and this version cannot train as written.

    `source` is what the message calls it: the name of its file.
    """
    features = unsupported_features(recipe)
    if features:
        raise UserError(f"{source}: {'; '.join(features)}")
    if not recipe.data_stages:
        raise UserError(
            f"{source}: data_stages: expected at least one stage: the recipe says nothing about what to read"
        )
    require_variables(recipe)


def prepare_run(request: RunRequest) -> PreparedRun:
    """Choose the run, check that its past allows this recipe, take its lock, write its recipe.

    Raises:
        UserError: data is missing, damaged or of other text than there is now, the resume would change a step already
            taken, or the run would fail at its end.
        RunIsTrained: another launch trains the run.
    """
    recipe = request.loaded.recipe
    check_trainable(recipe, request.loaded.path.name)
    notes = _text_notes(recipe)
    plan = DataPlan.from_recipe(recipe)
    notes += repetition_notes(plan)
    check_recipe_to_the_end(recipe)
    launch_id = request.launch_id or new_launch_id()
    before = set(request.runs_dir.iterdir()) if request.runs_dir.is_dir() else None
    choice, lock = take_run(
        request.runs_dir,
        request.loaded.name,
        recipe,
        request.run_name,
        lambda folder: fits_unfinished_run(folder, recipe, plan),
        launch_id,
    )
    folder = choice.folder
    try:
        changes: tuple[str, ...] = ()
        stored = 0
        if choice.state != "complete":
            refuse_what_others_have(folder, launch_id)
            stored, said = look_into_store(folder, recipe, is_new=choice.state == "new")
            notes += said
        begins = choice.state == "new" or (folder.completed_step() is None and not folder.steps() and not stored)
        recipe = _with_skipped_ranges(folder, recipe, begins=begins)
        if not begins:
            _refuse_changes_of_the_past(folder, recipe, plan.fingerprint_through, stored)
        if choice.state != "complete":
            _refuse_steps_of_nobody(folder)
            branch = check_branch(recipe, plan) if begins else Branch()
            notes += branch.notes
            check_places(folder, recipe)
            changes = (
                _begin(folder, replace(request.loaded, recipe=recipe), plan.fingerprint, branch.parent)
                if begins
                else _write_changes(folder, recipe, plan.fingerprint, stored)
            )
            folder.reopen()
            point_latest(request.runs_dir, folder)
        step = newest_step(folder, recipe, stored=stored)
        if step >= recipe.tokens.train_steps:  # nobody will read it before it is exported
            step = newest_step(folder, recipe, checksums=True)
    except BaseException:
        lock.release()
        _leave_as_it_was(folder, before)
        raise
    return PreparedRun(folder, recipe, choice.state, step, launch_id, lock, changes, tuple(notes))


def _leave_as_it_was(folder: RunFolder, before: set[Path] | None) -> None:
    """Remove what a launch that is refused has made; `before`: what there was among the runs, None without a folder."""
    if folder.path not in (before or ()):
        folder.remove_unbegun()
    if before is None:
        with suppress(OSError):  # other runs are there meanwhile
            folder.path.parent.rmdir()


def _text_notes(recipe: Recipe) -> list[str]:
    """Which shards were made of other text than there is now, or of text out of reach, where it needs the network.

    Raises UserError where it does not: `pretrain` has made such shards again, and who starts torchrun has to.
    """
    text = look_at_text(recipe)
    if recipe.corpus is None or any(source.is_remote for source in recipe.corpus.sources):
        return [*(f"{line}; next: `tokenize`" for line in text.outdated), *text.gone]
    if text.outdated:
        more = f" (and {counted(len(text.outdated) - 1, 'source')} more)" if len(text.outdated) > 1 else ""
        raise UserError(f"{text.outdated[0]}{more}; run `nanotron-recipes tokenize RECIPE` first")
    return []


def newest_step(folder: RunFolder, recipe: Recipe, *, checksums: bool = False, stored: int = 0) -> int:
    """The step that the run goes on from: of its newest sound checkpoint, else of the one it branched off, else 0.

    Args:
        stored: the step that the store has and this run's disks, as far as they are sound, have not; else 0.
    """
    if stored:
        return stored
    parent = parent_checkpoint(recipe) if not folder.steps() and recipe.checkpoints.load_lr_scheduler else None
    return parent[1].step if parent is not None else newest_sound_step(folder, checksums=checksums)


def reason_not_to_train(prepared: PreparedRun, stop_after: int | None) -> str | None:
    """Why there is no step for this launch to take, as a line for the user; None where there is one.

    A run whose steps are all taken and which is not `complete` lacks only what follows the last step.
    """
    path, step, last = prepared.folder.path, prepared.step, prepared.recipe.tokens.train_steps
    if prepared.state == "complete":
        return f"{path} is complete after step {last}; next: another --run, or more tokens.train_steps"
    if step >= last:
        return f"{path}: all {last} steps are trained"
    if stop_after is not None and step >= stop_after:
        return f"{path}: step {step} is saved, so --stop-after {stop_after} leaves nothing to train; next: leave it out"
    return None


def is_last_step_saved(recipe: Recipe) -> bool:
    """Whether a checkpoint follows the last step, due or not."""
    return recipe.checkpoints.save_final_state or recipe.checkpoints.export_at_end


def fits_unfinished_run(folder: RunFolder, recipe: Recipe, plan: DataPlan | None) -> bool:
    """Whether an unfinished run that nobody named fits: the topology may differ, what is learnt may not, neither in the
    past nor later. One whose recipe cannot be read any more does not fit.

    Without a `plan` of what `recipe` reads, as where no shard is seen, sources in other folders are other data.
    """
    try:
        refuse_what_others_have(folder)
        old = load_recipe(str(folder.recipe_file)).recipe
        recipe = _with_skipped_ranges(folder, recipe, begins=False)
        if not (_may_read_the_same(old, recipe) if plan is None else plan.fingerprint == folder.header().data):
            return False
        if plan is not None and folder.steps():
            require_data(folder, newest_sound_step(folder), plan.fingerprint_through)
        return not _objections(folder, recipe) and not later_changes(old, recipe, newest_step(folder, recipe))
    except UserError:
        return False


def _may_read_the_same(old: Recipe, new: Recipe) -> bool:
    """Whether the sources lie in the same folders, as far as their names have no variable that only a node fills."""
    pairs = zip_longest(_places(old), _places(new), fillvalue="")
    return all(was == now or "${" in was + now for was, now in pairs)


def _places(recipe: Recipe) -> list[str]:
    """The place of the tokenized corpus, and of each stage's sources in its order."""
    folders = (folder for stage in recipe.data_stages for folder in stage.data.dataset.dataset_folder)
    return [recipe.corpus.path or "" if recipe.corpus else "", *folders]


def _with_skipped_ranges(folder: RunFolder, recipe: Recipe, *, begins: bool) -> Recipe:
    """The recipe with what the run, or where it `begins` the one it branches off, began to skip after a spike."""
    file = folder.recipe_file
    if begins and recipe.checkpoints.load_lr_scheduler:
        with suppress(UserError):  # whoever begins from it is told later
            parent = parent_checkpoint(recipe)
            file = file if parent is None else parent[0] / "recipe.yaml"
    return keep_ranges(load_recipe(str(file)).recipe, recipe) if file.is_file() else recipe


def _refuse_steps_of_nobody(folder: RunFolder) -> None:
    """Checkpoints that no recipe belongs to are not overwritten: whose they are is for a person to say."""
    if not folder.exists() and folder.steps():
        raise UserError(
            f"{folder.checkpoints}: there are checkpoints (the newest of step {folder.steps()[-1]}), and no "
            f"{folder.recipe_file} says whose; move them away, or choose another --run"
        )


def _begin(folder: RunFolder, loaded: LoadedRecipe, data: str, parent: str) -> tuple[str, ...]:
    """Write the recipe of a run that has no checkpoint: a new one, or one that was begun, whose past nothing holds.

    Returns what is different from before, a line each, which the recipe keeps.
    """
    recipe = loaded.recipe
    changes: tuple[str, ...] = ()
    header = RunHeader(loaded.name, code_version(), data, parent=parent, run=new_run_id())
    if folder.exists():
        before, old, step = folder.header(), load_recipe(str(folder.recipe_file)).recipe, newest_step(folder, recipe)
        if left_behind := _left_behind(folder, old, recipe):
            raise UserError(f"{folder.path}: {left_behind}")
        found = [str(change) for change in (*changes_of_the_past(old, recipe, step), *later_changes(old, recipe, step))]
        found += [_other_data(before.data, data)] if before.data != data else []
        changes = tuple(f"after step {step}: {change}" for change in found)
        header = replace(header, changes=(*before.changes, *changes), run=before.run or header.run)
    keep_tokenizer(folder, recipe)
    folder.write_recipe(dump_yaml(recipe), header)
    return changes


def _left_behind(folder: RunFolder, old: Recipe, recipe: Recipe) -> str:
    """Says that the run has checkpoints where the recipe does not look for them; else empty."""
    before = RunFolder.of(folder.path.parent, folder.name, old)
    if folder.steps() or not before.steps():
        return ""
    change = Change(
        "checkpoints.checkpoints_path", old.checkpoints.checkpoints_path, recipe.checkpoints.checkpoints_path
    )
    return f"{change}: its checkpoints are in {before.checkpoints}; expected them in {folder.checkpoints}"


def _objections(folder: RunFolder, recipe: Recipe, stored: int = 0) -> list[str]:
    """Why the run in `folder` cannot go on with this recipe: what would change steps already taken."""
    old, step = load_recipe(str(folder.recipe_file)).recipe, newest_step(folder, recipe, stored=stored)
    changes = changes_of_the_past(old, recipe, step)
    if recipe.tokens.train_steps < step and not any(change.key == "tokens.train_steps" for change in changes):
        changes.append(Change("tokens.train_steps", old.tokens.train_steps, recipe.tokens.train_steps))
    objections = [str(change) for change in changes]
    before, now = old.checkpoints, recipe.checkpoints
    for key in ("resume_checkpoint_path", "load_optimizer", "load_lr_scheduler"):
        if getattr(before, key) != getattr(now, key):
            objections.append(str(Change(f"checkpoints.{key}", getattr(before, key), getattr(now, key))))
    left_behind = _left_behind(folder, old, recipe)
    return [*objections, *([left_behind] if left_behind else [])]


def _other_data(old: str, new: str) -> str:
    return f"data fingerprint: {old[:12]} → {new[:12]}"


def _refuse_changes_of_the_past(folder: RunFolder, recipe: Recipe, data: DataThrough, stored: int) -> None:
    objections = _objections(folder, recipe, stored)
    if objections:
        step = newest_step(folder, recipe, stored=stored)
        raise UserError(
            f"{folder.path}: going on after step {step} would change steps already taken: "
            f"{'; '.join(objections)}; take the change back, or start another run with --run"
        )
    if folder.steps() and not stored:  # what comes from the store is looked at by the ranks
        require_data(folder, newest_sound_step(folder), data)
        _refuse_checkpoint_of_another_run(folder, newest_sound_step(folder))


def _refuse_checkpoint_of_another_run(folder: RunFolder, step: int) -> None:
    """A checkpoint holds the recipe that it was trained with: up to its step that must be the run's own."""
    path = folder.step_folders(step)[0]
    if not (path / "recipe.yaml").is_file():
        return
    trained, own = (load_recipe(str(file)).recipe for file in (path / "recipe.yaml", folder.recipe_file))
    changes = changes_of_the_past(trained, own, step)
    if changes:
        raise UserError(
            f"{path}: a checkpoint of another run, trained with another recipe than {folder.recipe_file}: "
            f"{'; '.join(map(str, changes))}; move it away"
        )


def _write_changes(folder: RunFolder, recipe: Recipe, data: str, stored: int) -> tuple[str, ...]:
    """Make `recipe` the run's recipe; what differs in the run's future, a line each, which the recipe keeps."""
    step, old = newest_step(folder, recipe, stored=stored), load_recipe(str(folder.recipe_file)).recipe
    header = folder.header()
    found = [str(change) for change in later_changes(old, recipe, step)]
    found += [_other_data(header.data, data)] if header.data != data else []
    changes = tuple(f"after step {step}: {change}" for change in found)
    header = replace(header, data=data, changes=(*header.changes, *changes), run=header.run or new_run_id())
    folder.write_recipe(dump_yaml(recipe), header)
    return changes
