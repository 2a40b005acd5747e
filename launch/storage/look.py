"""What the store has for a launch that is being prepared: a free place, and perhaps a newer checkpoint than ours."""

from launch.storage.remote import check_owner, newest_fitting_step, run_store
from launch.storage.store import StoreFailed
from launch.train.resume import newest_sound_step
from launch.train.run_folder import RunFolder
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe

_CREDENTIALS = "credentials are those of AWS's own configuration; s3_upload=null trains without"


def look_into_store(folder: RunFolder, recipe: Recipe, *, is_new: bool) -> tuple[int, list[str]]:
    """The step to be resumed from the store, and what a person should know.

    Args:
        is_new: whether nothing was trained yet: then the store has to let us in. Later no refusal ends a run.

    Returns:
        The newest step in the store that is of the run's past and newer than what is sound on its disks (0: none), and
        notes.

    Raises:
        UserError: the place is another run's; of a new run, the store refuses us.
    """
    store = run_store(folder, recipe)
    if store is None:
        return 0, []
    try:
        store.check_bucket()
        check_owner(store, folder, folder.header().run if folder.exists() else "")
        return (newest_fitting_step(store, folder, _newest_here(folder)) if folder.exists() else 0), []
    except StoreFailed as error:
        if is_new and error.is_refusal:
            raise UserError(f"s3_upload.upload_s3_path: {error}; {_CREDENTIALS}") from None
        return 0, [f"s3_upload.upload_s3_path: {error}; training does not wait for it"]


def _newest_here(folder: RunFolder) -> int:
    try:
        return newest_sound_step(folder)
    except UserError:
        return 0
