"""Which checkpoints of a run are whole in the store, and which of them belong to its past. Imports no torch."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.s3 import Patience
from launch.storage.store import RunStore
from launch.train.run_folder import RunFolder
from nanotron_recipes.errors import UserError
from nanotron_recipes.frozen import changes_of_the_past
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import MANIFEST_FILE, STEP_NAME, FileEntry, Manifest, read_manifest

OWNER = "owner.json"
RECIPE_FILE = "recipe.yaml"
_IDENTITY_DIGITS = 16


def identity_of(manifest: bytes) -> str:
    """What a checkpoint is called in the store, from the content of its manifest."""
    return hashlib.sha256(manifest).hexdigest()[:_IDENTITY_DIGITS]


def local_identity(folders: Sequence[Path]) -> str:
    """`identity_of` a checkpoint on this machine, of the first of its folders with a manifest; empty without one."""
    for folder in folders:
        try:
            return identity_of((folder / MANIFEST_FILE).read_bytes())
        except OSError:
            continue
    return ""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint of which every file is in the store.

    Attributes:
        text: its manifest as it is written.
    """

    step: int
    identity: str
    text: bytes
    manifest: Manifest

    @property
    def folder(self) -> str:
        """Where its files are, in the run's part of the store."""
        return f"{self.step}/{self.identity}/"


def run_store(folder: RunFolder, recipe: Recipe, patience: Patience | None = None) -> RunStore | None:
    """The run's part of the store; None where the recipe uploads nothing."""
    upload = recipe.s3_upload
    if upload is None or upload.upload_s3_path is None:
        return None
    return RunStore(upload, folder.name) if patience is None else RunStore(upload, folder.name, patience=patience)


def remote_steps(store: RunStore) -> list[int]:
    """The steps that the store has anything of, ascending. Raises StoreFailed."""
    return sorted(int(name) for name in store.folders() if STEP_NAME.fullmatch(name))


def remote_checkpoints(store: RunStore, step: int) -> list[RemoteCheckpoint]:
    """The checkpoints of a step that are whole. Raises StoreFailed."""
    found = []
    for identity in store.folders(f"{step}/"):
        text = store.read(f"{step}/{identity}/{MANIFEST_FILE}")
        manifest = None if text is None or identity_of(text) != identity else _parse(text)
        if text is not None and manifest is not None and manifest.step == step:
            found.append(RemoteCheckpoint(step, identity, text, manifest))
    return found


def _parse(text: bytes) -> Manifest | None:
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, MANIFEST_FILE).write_bytes(text)
        try:
            manifest = read_manifest(Path(scratch))
        except UserError:
            return None
    return manifest if manifest.files else None


def why_not_of_this_run(
    store: RunStore, found: RemoteCheckpoint, folder: RunFolder, data: Callable[[int], str] | None = None
) -> str:
    """Why a checkpoint does not belong to the run as it is; empty where it does.

    After a rewind the store still has what the run went back from: it has read batches that the run's recipe skips.

    Args:
        data: the fingerprint of what is read up to a step; None: nobody looks at that.

    Raises:
        StoreFailed.
    """
    if data is not None and found.manifest.data != data(found.step):
        return "it was trained on other data"
    if found.manifest.entry(RECIPE_FILE) is None:
        return ""
    text = store.read(found.folder + RECIPE_FILE)
    if text is None:
        return f"its {RECIPE_FILE} is gone"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, RECIPE_FILE)
        file.write_bytes(text)
        try:
            changes = changes_of_the_past(
                load_recipe(str(file)).recipe, load_recipe(str(folder.recipe_file)).recipe, found.step
            )
        except UserError as error:
            return str(error).replace(str(file), found.folder + RECIPE_FILE)
    return f"it was trained with another recipe: {'; '.join(map(str, changes))}" if changes else ""


def newest_fitting_step(store: RunStore, folder: RunFolder, than: int) -> int:
    """The newest step that is whole in the store and of this run's past, newer than a local one; else 0.

    Raises:
        StoreFailed.
    """
    for step in reversed(remote_steps(store)):
        if step <= than:
            return 0
        if any(not why_not_of_this_run(store, found, folder) for found in remote_checkpoints(store, step)):
            return step
    return 0


def check_owner(store: RunStore, folder: RunFolder, run: str) -> None:
    """Raise UserError where the store's place belongs to another run than the one that `RunHeader.run` says.

    Raises:
        StoreFailed.
    """
    text = store.read(OWNER)
    if text is None:
        return
    try:
        owner = json.loads(text)
        of_run, begun_in = str(owner["run"]), str(owner["folder"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"{store.url(OWNER)}: damaged; expected which run the checkpoints beside it belong to"
        ) from None
    if of_run != run:
        raise UserError(
            f"s3_upload.upload_s3_path: {store.url()}: belongs to another run, begun in {begun_in}; choose another "
            f"--run, or, to go on with that one, put the recipe.yaml of one of its steps at {folder.recipe_file}"
        )


def own(store: RunStore, folder: RunFolder) -> None:
    """Note in the store which run its place belongs to. Raises UserError, StoreFailed."""
    run = folder.header().run
    check_owner(store, folder, run)
    if store.read(OWNER) is None:
        content = {"run": run, "folder": str(folder.path.absolute())}
        store.write(OWNER, json.dumps(content, indent=1).encode() + b"\n")
        check_owner(store, folder, run)


def entries_of(found: Manifest) -> list[FileEntry]:
    """The largest first: what takes longest is begun first."""
    return sorted(found.files, key=lambda entry: (-entry.size, entry.name))
