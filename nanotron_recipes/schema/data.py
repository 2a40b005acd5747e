"""Sections `data_stages`, `data_skipped_ranges`, `tokenizer`, `corpus`: what the model reads, and where it is from."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from nanotron_recipes.schema.section import (
    NANOTRON_SEED,
    Fraction,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    null_means,
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", value):
        raise PydanticCustomError(
            "folder_name",
            "a folder's name: at most 100 letters a to z, digits, '.', '-' and '_', not beginning with '.'",
        )
    return value


class Dataset(Section):
    """Section `data_stages[].data.dataset`: folders of tokenized shards and their shares."""

    dataset_folder: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Folders of .ds shards: paths, or s3://bucket/prefix. A name of a source in `corpus` means the folder that
    `tokenize` writes for it."""

    dataset_weights: list[NonNegativeFloat] | None = None
    """Share of each folder in the stage, brought to the sum 1. Null: equal shares."""

    dataset_read_path: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Where each folder's shards are read from on every node: `data stage` copies there what a run reads, and on one
    machine `pretrain` does. Null: under data_staging.path, or where dataset_folder says."""

    vocab_size: PositiveInt | None = None
    """Vocabulary that the shards were tokenized with: that of their manifests, and at most the model's. Null: whatever
    the manifests say."""

    token_size_in_bytes: Literal[2, 4] | None = None
    """Bytes of a token in the shards; compared with their manifest. Null: as the shards say."""

    tokenizer_name: Annotated[str | None, NoEffect("shards know their tokenizer by its hash")] = None
    """nanotron's name for the tokenizer of the shards."""

    pad_samples_to_global_batch_size: Annotated[bool, NoEffect("a source starts again when it is used up")] = False
    """Fill the last batch of an epoch."""

    return_positions: Annotated[bool, NoEffect("positions follow from _use_doc_masking")] = True
    """Hand document positions to the model."""

    use_old_brrr_dataloader: Annotated[bool, NoEffect("there is one loader here")] = False
    """Use nanotron's earlier loader."""


class StageData(Section):
    """Section `data_stages[].data`."""

    dataset: Dataset
    """The sources and their shares."""

    seed: Annotated[NonNegativeInt, null_means(NANOTRON_SEED)] = NANOTRON_SEED
    """Seed of the order in which sequences are read."""

    num_loading_workers: Annotated[NonNegativeInt, null_means(1)] = 1
    """Threads that read batches ahead on every rank, the same batches whatever their number; of several stages the
    largest number counts. 0: a batch is read when its step begins."""


class DataStage(Section):
    """An entry of `data_stages`: a mixture and the step from which it is read."""

    name: str
    """Name in the records of the run."""

    start_training_step: PositiveInt
    """First step that reads this mixture; 1 for the first stage, then rising. It belongs to the batch of that number:
    batches that are skipped before it (data_skipped_ranges) bring the stage forward by as many steps."""

    data: StageData
    """The mixture."""

    sequence_length: PositiveInt | None = None
    """Tokens of a sequence in this stage, as in later nanotron; the batch stays the same number of sequences. Null:
    tokens.sequence_length."""


class DataStaging(Section):
    """Section `data_staging`: how shards come from S3 or a shared file system to every node's own disk. New here."""

    path: str | None = None
    """Folder on every node's own disk for what has no dataset_read_path: /shared/a is read from <path>/shared/a, s3://b/c
    from <path>/s3/b/c. Null: such folders are read where they are."""

    endpoint_url: str | None = None
    """Server of the s3:// folders, such as https://s3.example.com. Null: what AWS's own configuration says
    (AWS_ENDPOINT_URL_S3, ~/.aws/config), as for credentials and regions."""

    workers: PositiveInt = 16
    """Files that are copied at the same time."""

    s5cmd_path: str | None = None
    """s5cmd, which is faster than boto3 with objects of many GB. Null: the one on PATH; without one, boto3."""

    s5cmd_concurrency: PositiveInt = 5
    """Parts of a file that s5cmd gets at the same time."""


class SkippedRange(Section):
    """An entry of `data_skipped_ranges`: batches that no step reads. A batch's number is the step that would read it if
    nothing were skipped."""

    first: PositiveInt
    """The first skipped batch."""

    end: PositiveInt
    """The batch after the last skipped one."""

    spike_step: PositiveInt | None = None
    """The step whose loss made the run go back, where the run wrote the entry (guards.rewind_after_spike); null in
    entries of yours."""


class TrainTokenizer(Section):
    """Section `tokenizer.train`: make a byte-level BPE from the corpus."""

    vocab_size: PositiveInt
    """Entries, the 256 bytes and the special tokens included."""


class Tokenizer(Section):
    """The tokenizer: an existing one, or one trained on the corpus."""

    tokenizer_name_or_path: str | None = None
    """Folder of an existing tokenizer. One that has a hub name, as in published files, has to be downloaded to a folder
    first. Null: the one that `train` makes."""

    tokenizer_revision: Annotated[str | None, NoEffect("tokenizers are read from a folder so far")] = None
    """Revision of a tokenizer on the hub."""

    tokenizer_max_length: Annotated[
        PositiveInt | None, NoEffect("documents are never cut; sequences are windows over all of them")
    ] = None
    """Longest text that nanotron's tokenizer takes."""

    train: TrainTokenizer | None = None
    """Train a tokenizer on the corpus. Only where tokenizer_name_or_path is null."""


Reader = Literal["python-code", "python-docs", "arithmetic", "jsonl", "parquet", "text"]


class CorpusSource(Section):
    """An entry of `corpus.sources`: text of one kind."""

    name: Annotated[str, AfterValidator(_folder_name)]
    """Name of the source; the folder of its shards, and what dataset_folder calls it. At most 100 letters a to z,
    digits, '.', '-' and '_'; not 'tokenizer', which is the tokenizer's folder."""

    reader: Reader
    """python-code: modules of the standard library; python-docs: their docstrings and Python's help topics; arithmetic:
    generated exact sums and differences; jsonl (also .gz, .zst), parquet, text: files of yours."""

    path: str | None = None
    """File or folder to read, for jsonl, parquet and text: of this machine, s3://bucket/folder (endpoint and
    credentials are boto3's, as AWS_ENDPOINT_URL_S3), or hf://datasets/owner/name, a data set of the hub."""

    revision: str | None = None
    """Commit, tag or branch of the data set that an hf:// path names, without which it is not read; the manifest keeps
    it. A commit is the one that never changes."""

    glob: str | None = None
    """Which files of the folder, such as data/CC-MAIN-2024-10/*.parquet; null: all that the reader
    understands, but for names that begin with a dot."""

    text_key: str = "text"
    """Field or column that holds the text, for jsonl and parquet."""

    documents: PositiveInt | None = None
    """At most so many documents; for arithmetic the number to generate. Null: all; for arithmetic 40,000."""

    needs_network: bool = False
    """Whether reading needs the network; then `pretrain` does not tokenize by itself. s3:// and hf:// paths need it in
    any case."""

    @property
    def is_remote(self) -> bool:
        """Whether it is read through the network."""
        return self.needs_network or (self.path is not None and "://" in self.path)


class Corpus(Section):
    """Text that `tokenize` turns into shards."""

    path: str
    """Folder for the tokenizer, the shards and their manifests. Default: corpora/<recipe name>."""

    upload_to: str | None = None
    """s3://bucket/prefix that `tokenize` brings the finished sources and their tokenizer to: every file is read back
    and hashed, each manifest is written last. Null: they stay in path alone."""

    sources: Annotated[list[CorpusSource], Field(min_length=1)]
    """The kinds of text."""

    validation_fraction: Fraction = 0.05
    """Part of each source's documents that is held out for the validation loss, chosen by hash."""

    seed: NonNegativeInt = NANOTRON_SEED
    """Seed of generated text and of the choice of held-out documents."""
