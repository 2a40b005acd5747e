"""On resume the past is frozen, the future and the topology are free."""

import pytest

from data.mixture import quotas_of
from nanotron_recipes.frozen import Change, changes_of_the_past, later_changes
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

OLD = load_recipe("tiny").recipe
FOURTH_STAGE = "{name: more, start_training_step: 1000, data: {dataset: {dataset_folder: [maths]}}}"


def new(*overrides: str) -> Recipe:
    return load_recipe("tiny", overrides).recipe


def keys(changes: list[Change]) -> list[str]:
    return [change.key for change in changes]


def test_the_same_recipe_has_no_changes() -> None:
    assert changes_of_the_past(OLD, new(), 700) == [] == later_changes(OLD, new(), 700)


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=bfloat16",
        "model.init_method.std=0.1",
        "model.model_config.rope_theta=5e4",
        "model.model_config.use_qk_norm=true",
        "general.seed=1",
        "tokens.sequence_length=128",
        "tokens.global_batch_size=24",
        "optimizer.weight_decay=0.0",
        "optimizer.clip_grad=null",
        "optimizer.optimizer_factory.adam_beta2=0.99",
        "optimizer.learning_rate_scheduler.learning_rate=1e-3",
        "optimizer.learning_rate_scheduler.lr_warmup_steps=10",
        "data_stages.0.data.seed=3",
        "data_stages.0.data.dataset.dataset_weights=[1, 1, 1]",
        "data_stages.1.start_training_step=560",
        "data_stages.1.start_training_step=540",
    ],
)
def test_what_steps_taken_depend_on_is_frozen(override: str) -> None:
    changes = changes_of_the_past(OLD, new(override), 600)
    assert keys(changes) == [override.partition("=")[0]]


@pytest.mark.parametrize(
    "override",
    [
        "parallelism.dp=3",
        "parallelism.pp=2",
        "parallelism.tp=2",
        "parallelism.pp_engine=afab",
        "parallelism.tp_mode=ALL_REDUCE",
        "tokens.micro_batch_size=2",
        "optimizer.zero_stage=1",
        "optimizer.accumulate_grad_in_fp32=false",
        "checkpoints.checkpoint_interval=7",
        "checkpoints.export_at_end=false",
        "logging.log_level=debug",
        "tokens.val_check_interval=10",
        "general.purpose=other",
        "general.run=other",
        "general.cpu_ranks_per_node=1",
        "general.deterministic=true",
        "guards.rewind_after_spike=true",
        "model.model_config._attn_implementation=sdpa",
        "slurm.partition=x",
        "profiler.profiler_export_path=traces",
        "s3_upload.upload_s3_path=s3://bucket/x",
        "corpus.path=elsewhere",
        "data_stages.0.name=other",
        "data_stages.0.data.dataset.dataset_folder=[x/prose, x/code, x/maths]",
        "data_stages.0.data.dataset.dataset_read_path=[/nvme/prose, /nvme/code, /nvme/maths]",
        "data_staging.path=/nvme",
        "data_stages.0.data.num_loading_workers=3",
    ],
)
def test_topology_and_surroundings_are_free(override: str) -> None:
    assert changes_of_the_past(OLD, new(override), 600) == [] == later_changes(OLD, new(override), 600)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["tokens.train_steps=2000"], ["tokens.train_steps"]),
        (
            ["optimizer.learning_rate_scheduler.lr_decay_starting_step=700"],
            ["optimizer.learning_rate_scheduler.lr_decay_starting_step"],
        ),
        (
            ["optimizer.learning_rate_scheduler.lr_decay_style=1-sqrt"],
            ["optimizer.learning_rate_scheduler.lr_decay_style"],
        ),
        (["data_stages.2.start_training_step=700"], ["data_stages.2.start_training_step"]),
        (
            ["data_stages.2.data.dataset.dataset_weights=[0, 0, 1]"],
            ["data_stages.2.data.dataset.dataset_weights"],
        ),
        ([f"data_stages.3={FOURTH_STAGE}"], ["data_stages.3"]),
    ],
)
def test_the_future_may_change_and_is_shown(overrides: list[str], changed: list[str]) -> None:
    assert changes_of_the_past(OLD, new(*overrides), 600) == []
    assert keys(later_changes(OLD, new(*overrides), 600)) == changed


def test_the_boundary_is_the_step_that_was_taken() -> None:
    stage = new("data_stages.1.data.dataset.dataset_weights=[0, 0, 1]")
    assert changes_of_the_past(OLD, stage, 550) == [] and changes_of_the_past(OLD, stage, 551) != []
    decay = new("optimizer.learning_rate_scheduler.lr_decay_style=cosine")
    # Step 793 still trains with the peak, the first point of any decay; step 794 tells them apart.
    assert changes_of_the_past(OLD, decay, 793) == [] and changes_of_the_past(OLD, decay, 794) != []


def test_only_the_guilty_key_of_the_schedule_is_named() -> None:
    changes = changes_of_the_past(
        OLD, new("tokens.train_steps=2000", "optimizer.learning_rate_scheduler.learning_rate=1.0"), 600
    )
    assert [str(change) for change in changes] == ["optimizer.learning_rate_scheduler.learning_rate: 0.01 → 1.0"]


def test_more_steps_are_the_past_where_the_decay_depends_on_them() -> None:
    derived = [
        "optimizer.learning_rate_scheduler.lr_decay_steps=null",
        "optimizer.learning_rate_scheduler.lr_decay_starting_step=null",
    ]
    old, longer = new(*derived), new(*derived, "tokens.train_steps=2000")
    assert keys(changes_of_the_past(old, longer, 600)) == ["tokens.train_steps"]
    assert changes_of_the_past(old, longer, 40) == []


def test_a_stage_that_was_read_cannot_go_and_equal_shares_may_be_spelt_out() -> None:
    shorter = OLD.model_copy(update={"data_stages": OLD.data_stages[:1]})
    changes = changes_of_the_past(OLD, shorter, 600)
    assert [str(change) for change in changes] == ["data_stages.1: 'stable stage 2 from step 551' → null"]
    assert keys(later_changes(OLD, shorter, 600)) == ["data_stages.2"]
    weights = "data_stages.0.data.dataset.dataset_weights"
    assert changes_of_the_past(new(f"{weights}=null"), new(f"{weights}=[1, 1, 1]"), 600) == []


@pytest.mark.parametrize(
    ("old", "same"), [("[0.5, 0.25, 0.25]", "[2, 1, 1]"), ("null", "[0.2, 0.2, 0.2]"), ("[0.1, 0.2, 0.3]", "[1, 2, 3]")]
)
def test_weights_of_the_same_shares_are_the_same(old: str, same: str) -> None:
    weights = "data_stages.0.data.dataset.dataset_weights"
    before, after = new(f"{weights}={old}"), new(f"{weights}={same}")
    assert changes_of_the_past(before, after, 600) == [] == later_changes(before, after, 0)
    lists = [recipe.data_stages[0].data.dataset.dataset_weights or [1.0] * 3 for recipe in (before, after)]
    assert quotas_of(lists[0]) == quotas_of(lists[1]), "they train the same"


def test_weights_of_other_shares_are_shown_as_they_are_written() -> None:
    weights = "data_stages.0.data.dataset.dataset_weights"
    before, after = new(f"{weights}=[0.33, 0.33, 0.34]"), new(f"{weights}=[1, 1, 1]")
    changes = changes_of_the_past(before, after, 600)
    assert [str(change) for change in changes] == [f"{weights}: [0.33, 0.33, 0.34] → [1.0, 1.0, 1.0]"]


def test_the_same_batch_in_other_words_is_the_same() -> None:
    words = ["parallelism.dp=2", "tokens.global_batch_size=null", "tokens.micro_batch_size=3"]
    assert changes_of_the_past(OLD, new(*words, "tokens.batch_accumulation_per_replica=2"), 600) == []
    changes = changes_of_the_past(OLD, new(*words, "tokens.batch_accumulation_per_replica=4"), 600)
    assert [str(change) for change in changes] == ["tokens.global_batch_size: 12 → 24"]


def test_skipped_batches_are_frozen_where_they_were_read_and_stages_lie_where_they_bring_them() -> None:
    old = new("data_skipped_ranges=[{first: 101, end: 201}]")
    assert [str(change) for change in changes_of_the_past(old, new(), 101)] == [
        "data_skipped_ranges: '101–200' → 'none'"
    ]
    assert changes_of_the_past(old, new(), 100) == [] and keys(later_changes(old, new(), 100)) == [
        "data_skipped_ranges"
    ]
    in_two = new("data_skipped_ranges=[{first: 151, end: 201}, {first: 101, end: 160, spike_step: 120}]")
    assert changes_of_the_past(old, in_two, 600) == [] == later_changes(old, in_two, 600)
    # batch 551, the first of the second stage, is read by step 451
    stage = "data_stages.1.data.dataset.dataset_weights=[0, 0, 1]"
    other = new("data_skipped_ranges=[{first: 101, end: 201}]", stage)
    assert changes_of_the_past(old, other, 450) == [] and changes_of_the_past(old, other, 451) != []
