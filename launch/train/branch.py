"""A run that begins from a checkpoint of another: whether it may go on there, and what it goes on with."""

from dataclasses import dataclass
from pathlib import Path

from data.plan import DataPlan
from data.tokenizer import other_tokens
from launch.train.resume import parent_checkpoint
from launch.train.run_tokenizer import run_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.frozen import Change, changes_of_the_past
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import contiguous_length
from parallel.checkpoint_files import Manifest

_OF_THE_BRANCH = ("model.model_config.rope_theta",)
"""Keys of which the parent's steps were taken with one value, and those of the branch with another: no weight and no
sample depends on them."""
_ORDER = ("data_stages", "tokens.sequence_length", "tokens.block_length")
_CONTIGUOUS = "tokens.contiguous_length"


@dataclass(frozen=True)
class Branch:
    """What a new run takes over.

    Attributes:
        parent: what the run's recipe says about the checkpoint that it starts from; empty without one.
        notes: what a person should know about it, one line each.
    """

    parent: str = ""
    notes: tuple[str, ...] = ()


def check_branch(recipe: Recipe, plan: DataPlan) -> Branch:
    """Find out whether a new run may start as its recipe says: from nothing, or from a checkpoint of another run.

    Raises:
        UserError: there is no such checkpoint, schedule and data that go on describe other steps up to it, or the text
            that is read is of other tokens than its model knows.
    """
    found = parent_checkpoint(recipe)
    if found is None:
        return Branch()
    (seen, manifest), path = found, recipe.checkpoints.resume_checkpoint_path
    parent = f"{path} (step {manifest.step}, data {manifest.data[:12] or 'none'})"
    old = load_recipe(str(seen / "recipe.yaml")).recipe if (seen / "recipe.yaml").is_file() else None
    if not recipe.checkpoints.load_lr_scheduler:
        return Branch(parent, (*_other_tokens(seen, old, recipe), *_read_again(old, plan)) if old is not None else ())
    if old is None:
        raise UserError(f"checkpoints.resume_checkpoint_path: {path}: no recipe.yaml in it to go on with")
    changes = changes_of_the_past(old, recipe, manifest.step)
    refused = [change for change in changes if change.key not in _OF_THE_BRANCH]
    objections = [str(change) for change in refused]
    if not any(change.key.startswith(_ORDER) for change in refused):
        objections += _objections_to_data(plan, manifest)
    if recipe.tokens.train_steps <= manifest.step:
        objections.append(f"tokens.train_steps: {recipe.tokens.train_steps}: expected more than {manifest.step}")
    if objections:
        raise UserError(
            f"checkpoints.resume_checkpoint_path: {path}: going on after step {manifest.step} would change steps "
            f"already taken: {'; '.join(objections)}; {_way_out(refused, old)}"
        )
    return Branch(parent, tuple(f"after step {manifest.step}: {change}" for change in changes))


def _objections_to_data(plan: DataPlan, manifest: Manifest) -> list[str]:
    """What the parent has read has to be the same; later stages may read other sources."""
    now = plan.fingerprint_through(manifest.step)
    return [] if manifest.data == now else [f"data fingerprint: {manifest.data[:12] or 'none'} → {now[:12]}"]


def _way_out(refused: list[Change], old: Recipe) -> str:
    if any(change.key.startswith(_ORDER) for change in refused):
        return (
            "keep the parent's tokens and stages, and give another mixture or data_stages[].sequence_length to a stage "
            "behind them, or begin at step 1 with checkpoints.load_lr_scheduler: false"
        )
    if any(change.key == _CONTIGUOUS for change in refused):
        length = contiguous_length(old)
        return f"with {_CONTIGUOUS}: {length} it goes on, and longer sequences are of several pieces of text"
    return "checkpoints.load_lr_scheduler: false begins at step 1"


def _other_tokens(seen: Path, old: Recipe, recipe: Recipe) -> tuple[str, ...]:
    """Says how many tokens mean something else than they did to the parent, as far as both tokenizers are at hand; a
    few may have got a use. Raises UserError where most do: every row of the embedding would be learnt anew."""
    of_run = seen.parent.parent / "tokenizer"
    theirs = of_run if (of_run / "tokenizer.json").is_file() else run_tokenizer(None, old)
    ours = run_tokenizer(None, recipe)
    if theirs is None or ours is None:
        return ()
    others, both = other_tokens(theirs, ours)
    path = recipe.checkpoints.resume_checkpoint_path
    said = f"{others:,} of {both:,} token ids stand for other tokens in {ours} than in {theirs}"
    if others > both / 2:
        raise UserError(
            f"checkpoints.resume_checkpoint_path: {path}: {said}, which its model was trained with; tokenize the text "
            f"with tokenizer.tokenizer_name_or_path: {theirs}"
        )
    return (f"checkpoints.resume_checkpoint_path: {path}: {said}",) if others else ()


def _read_again(old: Recipe, plan: DataPlan) -> tuple[str, ...]:
    """Says which text is read again from its beginning by a run that begins at step 1."""
    before = {name for stage in old.data_stages for name in stage.data.dataset.dataset_folder}
    both = [Path(name).name for name in plan.sources if name in before]
    said = "checkpoints.load_lr_scheduler: false: begins at step 1, and reads from the beginning what its parent read"
    return (f"{said}: {', '.join(both)}",) if both else ()
