"""The recipe: one immutable value that says everything about a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nanotron_recipes.schema.checkpoints import Checkpoints, S3Upload
from nanotron_recipes.schema.data import Corpus, DataStage, DataStaging, SkippedRange, Tokenizer
from nanotron_recipes.schema.general import General
from nanotron_recipes.schema.guards import Guards
from nanotron_recipes.schema.model import Model
from nanotron_recipes.schema.optimizer import Optimizer
from nanotron_recipes.schema.parallelism import Parallelism
from nanotron_recipes.schema.section import NoEffect, Section
from nanotron_recipes.schema.services import Lighteval, Logging, MetricsLogging, Profiler
from nanotron_recipes.schema.slurm import Slurm
from nanotron_recipes.schema.tokens import Tokens


class Recipe(Section):
    """A validated recipe. Sections and keys are nanotron's; `loading.load_recipe` reads one from a file."""

    general: General
    """Names and seed."""

    model: Model
    """The network."""

    tokens: Tokens
    """Sequences, batches, steps."""

    optimizer: Optimizer = Optimizer()
    """AdamW and its learning rate."""

    parallelism: Parallelism = Parallelism()
    """How the training is spread over ranks."""

    data_stages: list[DataStage] = Field(default_factory=list)
    """Mixtures in the order in which they are read."""

    data_skipped_ranges: list[SkippedRange] = Field(default_factory=list)
    """Batches that are left out: step t reads the t-th batch that is in no range. A run that goes back after a loss
    spike appends to the list; entries of yours leave out what you know to be bad. Ranges may overlap."""

    data_staging: DataStaging = DataStaging()
    """How shards come to the disks of the nodes."""

    tokenizer: Tokenizer = Tokenizer()
    """The tokenizer."""

    corpus: Corpus | None = None
    """Text that `tokenize` turns into shards; null where the shards exist."""

    checkpoints: Checkpoints = Checkpoints()
    """What is kept."""

    guards: Guards = Guards()
    """What is done about broken numbers and ranks that stand still."""

    logging: Logging = Logging()
    """What a run says."""

    profiler: Profiler | None = None
    """Trace a few steps."""

    slurm: Slurm = Slurm()
    """Resources on a cluster."""

    variables: dict[str, str] = Field(default_factory=dict)
    """Values for ${NAME} anywhere in the recipe but slurm.prologue, such as the roots of data; a name that is not here
    is taken from the environment, and so are names in these values."""

    s3_upload: S3Upload | None = None
    """Upload of checkpoints. Null: none."""

    lighteval: Lighteval | None = None
    """Evaluation of checkpoints while the run goes on. Null: none."""

    metrics_logging: Annotated[MetricsLogging | None, NoEffect("metrics.jsonl records every step in full")] = None
    """nanotron's per-layer statistics."""
