"""What of nanotron 0.4 is adapted, why, how, and which test shows it: the table in docs/nanotron-adaptations.md.

    python -m parallel.adaptations          writes the table again

Everything in `parallel/` that changes, subclasses or replaces a part of nanotron is listed here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["patch", "subclass", "replacement", "not used"]
"""patch: the module is changed when it is imported; subclass: the wheel's class with some methods of ours; replacement:
ours runs in its place; not used: nothing of it is needed."""

ISSUES = "https://github.com/huggingface/nanotron/issues/"
NONE_FILED = "none known"
TABLE_FILE = Path(__file__).resolve().parents[1] / "docs" / "nanotron-adaptations.md"


@dataclass(frozen=True)
class Adaptation:
    """One thing that nanotron 0.4 does not do, or does wrong, and what is done about it.

    Attributes:
        name: what it is about.
        symbol: where in nanotron, as a dotted path below `nanotron.`.
        defect: what happens with the wheel as published.
        upstream: numbers of the issues or pull requests in huggingface/nanotron that are about it.
        kind: how far ours departs from the wheel.
        done: what is done instead.
        where: our file.
        test: the test that shows it, as pytest names it, without parameters.
    """

    name: str
    symbol: str
    defect: str
    upstream: tuple[int, ...]
    kind: Kind
    done: str
    where: str
    test: str


ADAPTATIONS: tuple[Adaptation, ...] = (
    Adaptation(
        name="circular import",
        symbol="logging, config.config",
        defect="`import nanotron.config` fails, and so on: logging imports from config.config, which imports logging",
        upstream=(191, 235),
        kind="patch",
        done="logging is imported once while placeholders stand in for the two configuration modules",
        where="parallel/nanotron_import.py",
        test="tests/parallel/test_nanotron_import.py::test_nanotron_is_imported_in_a_new_process",
    ),
    Adaptation(
        name="names of collectives, barriers",
        symbol="distributed.reduce_scatter_tensor, distributed.all_gather_into_tensor, "
        "parallel.context.ParallelContext",
        defect="torch 2.13 renamed the first two and warns at every rank (older torch does not know the new names); it "
        "warns of a barrier without a device on CUDA, which is the current one",
        upstream=(),
        kind="patch",
        done="exactly these three warnings are filtered; nothing in torch or nanotron is changed",
        where="parallel/nanotron_import.py",
        test="tests/parallel/test_nanotron_import.py::"
        "test_only_the_two_renamed_collectives_and_barriers_on_the_current_device_are_silenced",
    ),
    Adaptation(
        name="device",
        symbol="parallel.context.ParallelContext.set_device",
        defect="calls torch.cuda.set_device, which raises without CUDA",
        upstream=(),
        kind="subclass",
        done="the device is chosen before, by our process groups; grid and groups are the wheel's",
        where="parallel/process_groups.py",
        test="tests/launch/test_engine_parts.py::test_what_runs_is_the_wheels",
    ),
    Adaptation(
        name="backend",
        symbol="distributed.initialize_torch_distributed",
        defect="raises NotImplementedError without CUDA",
        upstream=(),
        kind="replacement",
        done="init_process_group with gloo on the CPU, nccl on CUDA, before ParallelContext is made",
        where="parallel/process_groups.py",
        test="tests/launch/test_parity.py::test_training_does_not_depend_on",
    ),
    Adaptation(
        name="cached ranks",
        symbol="distributed.get_rank, distributed.get_global_rank",
        defect="remember ranks by process group for ever: a second world in the same process sees those of the first",
        upstream=(),
        kind="subclass",
        done="EngineContext.destroy clears both caches",
        where="parallel/process_groups.py",
        test="tests/parallel/test_process_groups.py::test_a_second_world_in_the_same_processes_has_its_own_ranks",
    ),
    Adaptation(
        name="sends that wait for the receiver",
        symbol="parallel.pipeline_parallel.p2p.P2P.send_tensors",
        defect="gloo's send is a rendezvous: with 1F1B two neighbours that both send wait for each other for ever",
        upstream=(),
        kind="subclass",
        done="sends post a copy and return; copies are dropped once a step (gloo only: nccl runs the wheel's P2P)",
        where="parallel/p2p.py",
        test="tests/parallel/test_p2p.py::test_two_neighbours_that_both_send_first_do_not_deadlock",
    ),
    Adaptation(
        name="partition into stages",
        symbol="models.base.build_model",
        defect="a stage may get no parameters at all (4 layers, vocabulary 510, pp 4), and training stops",
        upstream=(108,),
        kind="replacement",
        done="the largest stage is made as small as possible and none is empty; blocks are the wheel's PipelineBlock",
        where="parallel/partition.py",
        test="tests/parallel/test_partition.py::test_the_largest_stage_is_as_small_as_possible",
    ),
    Adaptation(
        name="gradient synchronisation",
        symbol="optim.gradient_accumulator.FP32GradientAccumulator, optim.gradient_accumulator.get_fp32_accum_hook",
        defect=(
            "bf16 with ZeRO-0 is a race: the hook keeps one handle for all buckets and only the last is waited for; "
            "buckets are rebuilt after step 1; ZeRO-1 reduces everything in one call that nothing overlaps; float32 "
            "parameters are refused"
        ),
        upstream=(),
        kind="replacement",
        done="flat float32 buckets in a fixed layout, reduced as they fill up, every handle waited for",
        where="parallel/gradients.py",
        test="tests/launch/test_parity.py::test_bfloat16_repeats_bit_by_bit_and_stays_near_the_reference",
    ),
    Adaptation(
        name="one seed for all tensor-parallel ranks",
        symbol="helpers.init_random_states, models.base.NanotronModel.init_model_randomly",
        defect="every tensor-parallel rank draws its own shard from the same seed: all shards start equal",
        upstream=(),
        kind="replacement",
        done="each tensor is drawn whole from a seed of its global name, and every rank takes its slices",
        where="parallel/initialization.py",
        test="tests/launch/test_parity_plants.py::test_parity_fails_with",
    ),
    Adaptation(
        name="initial float32 weights",
        symbol="optim.gradient_accumulator.FP32GradientAccumulator",
        defect="the float32 master weights start from the values that bf16 has rounded",
        upstream=(),
        kind="replacement",
        done="the master copy is given the values as drawn, the parameters their rounding",
        where="parallel/initialization.py",
        test="tests/parallel/test_initialization.py::test_the_master_copy_keeps_the_values_that_were_drawn",
    ),
    Adaptation(
        name="vocabulary padding",
        symbol="helpers._vocab_size_with_padding, parallel.tensor_parallel.functional.sharded_cross_entropy",
        defect="the padding depends on tp and takes part in the softmax (5.5965 at tp 1, 5.5985 at tp 2)",
        upstream=(),
        kind="replacement",
        done="the padded size is the recipe's at every tp, padding rows start at 0 and their logits are -inf",
        where="parallel/cross_entropy.py",
        test="tests/parallel/test_cross_entropy.py::test_padding_changes_nothing",
    ),
    Adaptation(
        name="cross-entropy over a split vocabulary",
        symbol="parallel.tensor_parallel.functional.sharded_cross_entropy",
        defect="three collectives, also on a single rank, and no log-normaliser for the z-loss",
        upstream=(),
        kind="replacement",
        done="two collectives, none on a single rank, z-loss in the same pass",
        where="parallel/cross_entropy.py",
        test="tests/parallel/test_cross_entropy.py::test_value_and_gradient_are_those_of_torch",
    ),
    Adaptation(
        name="mean of micro-batch means",
        symbol="parallel.pipeline_parallel.engine.PipelineEngine.forward",
        defect="each micro-batch's loss is divided by their number: with masks of uneven size the batch size matters",
        upstream=(),
        kind="replacement",
        done="the loss block scales the sum of a micro-batch so that the engine's division gives sum / global count",
        where="launch/train/engine.py",
        test="tests/launch/test_parity_plants.py::test_the_mean_of_means_disagrees_with_itself_at_another_micro_batch",
    ),
    Adaptation(
        name="unsharded parameters in a tensor-parallel region",
        symbol="trainer.mark_tied_parameters",
        defect="gains per head (QK-norm) are marked as needing no sum in ALL_REDUCE mode: the copies drift apart",
        upstream=(),
        kind="replacement",
        done="marked with the wheel's own marks, with a sum wherever a rank sees only a part of the computation",
        where="parallel/parameters.py",
        test="tests/launch/test_parity_plants.py::test_drifting_copies_are_named",
    ),
    Adaptation(
        name="asynchronous row layer",
        symbol=(
            "parallel.tensor_parallel.nn.TensorParallelRowLinear, "
            "parallel.tensor_parallel.functional._RowLinearAsyncCommunication.backward"
        ),
        defect="gathers the products with the other ranks' weights: the gradient of its input is wrong on every rank",
        upstream=(46, 172),
        kind="subclass",
        done="a backward pass of ours when communication is asynchronous; the wheel's layer otherwise",
        where="parallel/row_linear.py",
        test="tests/parallel/test_row_linear.py::test_the_asynchronous_layer_equals_the_synchronous_one",
    ),
    Adaptation(
        name="AdamW, parameter groups",
        symbol="optim.named_optimizer.NamedOptimizer, helpers.init_optimizer_and_grad_accumulator",
        defect="every parameter is decayed: there are no groups",
        upstream=(139,),
        kind="replacement",
        done="torch's AdamW on the flat buffers, decayed and undecayed ranges apart",
        where="parallel/optimizer.py",
        test="tests/parallel/test_optimizer.py::test_it_is_torchs_adamw_bit_by_bit",
    ),
    Adaptation(
        name="ZeRO-1",
        symbol="optim.zero.ZeroDistributedOptimizer",
        defect="walks over every parameter in Python and gathers them one by one; fills with CUDA tensors",
        upstream=(),
        kind="replacement",
        done="each data-parallel rank updates an equal range of every flat bucket; one gather a bucket",
        where="parallel/optimizer.py",
        test="tests/parallel/test_optimizer.py::test_zero_1_trains_as_zero_0",
    ),
    Adaptation(
        name="clipping",
        symbol="optim.clip_grads.clip_grad_norm",
        defect="a norm for every parameter on a literal CUDA device",
        upstream=(),
        kind="replacement",
        done="one norm a range of the flat buckets, one all-reduce, no synchronisation with the host",
        where="parallel/optimizer.py",
        test="tests/parallel/test_optimizer.py::test_clipping_scales_to_the_norm",
    ),
    Adaptation(
        name="validation",
        symbol="parallel.pipeline_parallel.engine.PipelineEngine.validate_batch_iter",
        defect="asserts that the loss requires a gradient, under inference mode, where nothing does",
        upstream=(351,),
        kind="replacement",
        done="the model is called without a pipeline state, which the wheel's blocks support",
        where="launch/train/engine.py",
        test="tests/launch/test_parity.py::test_evaluation_is_the_loss_of_training_at_any_topology",
    ),
    Adaptation(
        name="checkpoints",
        symbol="serialize",
        defect=(
            "resuming at another topology fails (KeyError), NumPy 2 breaks the metadata, latest.txt is written by "
            "every rank and before the rest"
        ),
        upstream=(106, 221),
        kind="replacement",
        done="torch.distributed.checkpoint with global tensors",
        where="parallel/checkpoint.py",
        test="tests/parallel/test_checkpoint.py::test_resuming_at_another_topology_continues_the_run",
    ),
    Adaptation(
        name="learning rate",
        symbol="helpers.lr_scheduler_builder",
        defect="a stateful scheduler whose rate is wrong after a resume",
        upstream=(233, 243),
        kind="replacement",
        done="the rate is a pure function of recipe and step, equal to the wheel's over a whole run",
        where="nanotron_recipes/schedule.py",
        test="tests/nanotron_recipes/test_schedule.py::test_linear_and_cosine_are_the_wheels_bit_by_bit",
    ),
    Adaptation(
        name="flash-attn",
        symbol="trainer, models.llama, models.starcoder2, nn.layer_norm",
        defect="import flash_attn at the top, which no CPU machine and few GPU machines have",
        upstream=(),
        kind="not used",
        done="these modules are never imported: the model is ours, on the wheel's parallel layers",
        where="model/llama.py",
        test="tests/launch/test_engine_parts.py::test_modules_that_need_flash_attn_are_not_imported",
    ),
    Adaptation(
        name="the model",
        symbol="models.base.NanotronModel",
        defect="abstract: what the wheel makes of it, models.llama and models.starcoder2, needs flash_attn",
        upstream=(),
        kind="subclass",
        done="a model of ours that the wheel's pipeline engines call, its weights drawn by parallel.initialization",
        where="model/llama.py",
        test="tests/launch/test_engine_parts.py::test_modules_that_need_flash_attn_are_not_imported",
    ),
    Adaptation(
        name="the training loop",
        symbol="trainer.DistributedTrainer",
        defect="its loop, data loading, schedule and checkpoints are what had to be replaced; no check for NaN",
        upstream=(),
        kind="not used",
        done="a loop of ours calls the engine's parts",
        where="launch/train/engine.py",
        test="tests/launch/test_engine_parts.py::test_modules_that_need_flash_attn_are_not_imported",
    ),
)


def replacement_reason(symbol: str) -> str:
    """Why a part of nanotron is replaced, or an empty string where it is not.

    Args:
        symbol: a dotted path below `nanotron.`, as in `Adaptation.symbol`.
    """
    reasons = [
        a.defect for a in ADAPTATIONS if symbol in a.symbol.split(", ") and a.kind in ("replacement", "not used")
    ]
    return "; ".join(reasons)


def render_table() -> str:
    """The documentation page, as markdown."""
    lines = [
        "# What is adapted in nanotron 0.4",
        "",
        "Written by `python -m parallel.adaptations` from `parallel/adaptations.py`; a test fails when it is stale.",
        "Everything that is not listed runs as published: the grid of ranks and its process groups, the pipeline",
        "blocks and both pipeline engines, the tensor-parallel layers, the marks for sharded and tied parameters.",
        "",
        "| what | in nanotron | defect | upstream | done | where | shown by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for adaptation in ADAPTATIONS:
        upstream = ", ".join(f"[#{number}]({ISSUES}{number})" for number in adaptation.upstream) or NONE_FILED
        cells = (
            adaptation.name,
            ", ".join(f"`{symbol}`" for symbol in adaptation.symbol.split(", ")),
            adaptation.defect,
            upstream,
            f"**{adaptation.kind}**: {adaptation.done}",
            f"`{adaptation.where}`",
            f"`{adaptation.test}`",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    TABLE_FILE.parent.mkdir(exist_ok=True)
    TABLE_FILE.write_text(render_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
