"""Sections `checkpoints` and `s3_upload`: what is kept, and where."""

from __future__ import annotations

from typing import Annotated

from nanotron_recipes.schema.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, null_means


class Checkpoints(Section):
    """The states of the run on disk."""

    checkpoints_path: str | None = None
    """Folder under which the run's steps are written, in a folder of the run's name. Null: in the run's folder."""

    checkpoint_interval: PositiveInt = 1000
    """Steps between two checkpoints. As many as you can bear to lose."""

    checkpoint_interval_minutes: PositiveFloat | None = None
    """Also write a checkpoint after so many minutes without one."""

    checkpoints_path_is_shared_file_system: Annotated[bool, null_means(False)] = False
    """True: all nodes see checkpoints_path, and a launch where one does not is refused. False: it is found out which
    nodes share a disk; each disk gets the parts of its ranks, and what a resume lacks is fetched from other nodes."""

    save_initial_state: Annotated[bool, null_means(False)] = False
    """Also write the untrained state, as step 0."""

    save_final_state: Annotated[bool, null_means(False)] = True
    """Write the state after the last step even where the interval does not."""

    export_at_end: bool = False
    """After the last step write a Hugging Face folder, verify it and generate from it."""

    resume_checkpoint_path: str | None = None
    """Checkpoint of another run, the folder of a step, to start a new run from."""

    load_optimizer: bool = True
    """Take the optimizer's state from resume_checkpoint_path as well. False: moments and counter begin at zero."""

    load_lr_scheduler: bool = True
    """Go on at the step after resume_checkpoint_path, in schedule and data, instead of starting at step 1."""

    keep_last: PositiveInt | None = None
    """Keep the last so many checkpoints and delete older ones. Null: keep all."""

    keep_every: PositiveInt | None = None
    """Never delete a checkpoint whose step is a multiple of this."""

    copies: PositiveInt = 1
    """Disks that each part of a checkpoint is written to, where nodes have disks of their own: with 2, losing one node
    costs no checkpoint."""


class S3Upload(Section):
    """Upload of checkpoints to S3."""

    upload_s3_path: str | None = None
    """s3://bucket/prefix to upload to."""

    remove_after_upload: bool = False
    """Delete the local checkpoint when the upload is verified."""

    s5cmd_numworkers: NonNegativeInt | None = None
    """Workers of s5cmd."""

    s5cmd_concurrency: NonNegativeInt | None = None
    """Parallel parts per file of s5cmd."""

    s5cmd_path: str | None = None
    """Where s5cmd is."""
