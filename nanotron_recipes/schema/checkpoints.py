"""Sections `checkpoints` and `s3_upload`: what is kept, and where."""

from __future__ import annotations

from typing import Annotated

from nanotron_recipes.schema.section import (
    NoEffect,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    null_means,
)


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
    """Keep the last so many checkpoints and delete older ones. Null: keep all. With `s3_upload`: of those on local
    disks, where what is not verified in the store yet stays too."""

    keep_every: PositiveInt | None = None
    """Steps that are multiples of this are kept, whatever keep_last says. With `s3_upload` they are kept in the store
    only, where nothing is deleted."""

    copies: PositiveInt = 1
    """Disks that each part of a checkpoint is written to, where nodes have disks of their own: with 2, losing one node
    costs no checkpoint."""


class S3Upload(Section):
    """Upload of checkpoints to a store, of whatever maker. Credentials and region are those of AWS's own configuration
    (environment, ~/.aws, a role of the machine): none stands in a recipe."""

    upload_s3_path: str | None = None
    """s3://bucket/prefix under which the run's steps are put, in a folder of the run's name. Null: nothing is uploaded.
    With it, keep_last counts what lies on local disks; in the store nothing is ever deleted."""

    endpoint_url: str | None = None
    """Server of upload_s3_path, such as https://s3.example.com. Null: what AWS's own configuration says
    (AWS_ENDPOINT_URL_S3, ~/.aws/config)."""

    remove_after_upload: bool = False
    """Delete a local checkpoint as soon as it is verified in the store and a newer one is there: keep_last 1."""

    max_backlog: PositiveInt = 3
    """Steps that may wait to be uploaded beside the newest, the one that is being sent among them. Beyond it the oldest
    that is not being sent is given up, and said so: a disk holds keep_last + 1 + max_backlog steps at most."""

    workers: PositiveInt = 8
    """Files that a node sends, or fetches, at the same time; each takes 32 MB of memory."""

    max_megabytes_per_second: PositiveFloat | None = None
    """Most that a node sends, in 10^6 bytes a second, counted over the whole upload. Null: as fast as it goes."""

    longest_wait_seconds: NonNegativeInt = 600
    """How long a launch that has trained all its steps waits for what is not uploaded yet."""

    s5cmd_numworkers: Annotated[NonNegativeInt | None, NoEffect("boto3 uploads; s3_upload.workers is like it")] = None
    """Workers of s5cmd."""

    s5cmd_concurrency: Annotated[NonNegativeInt | None, NoEffect("boto3 uploads; s3_upload.workers is like it")] = None
    """Parallel parts per file of s5cmd."""

    s5cmd_path: Annotated[str | None, NoEffect("boto3 uploads")] = None
    """Where s5cmd is."""
