"""The two training loops that `train_step.py` compares: ours, and a bare loop over a transformers model.

Both get the same initial weights, token windows, optimizer settings and clipping, and both read the loss after every
step, as a training run does.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch.nn.parallel import DistributedDataParallel

from data.batch import MicroBatch, StepBatch, micro_batch_from_windows
from launch.train.engine import TrainingEngine
from launch.train.synthetic import synthetic_batch
from model.build import decay_rule, initialize_weights
from model.hf_mapping import hf_class, hf_config, parameter_map, split_to_hf, token_ids_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import Topology
from parallel.process_groups import EngineContext

LEARNING_RATE = 1e-3
NUM_BATCHES = 4
"""Different batches that a loop goes through again and again."""


def whole_window_batch(recipe: Recipe, topology: Topology, step: int, dp_rank: int) -> StepBatch:
    """Random tokens, one document a window: every target counts and attention is plainly causal."""
    length = recipe.tokens.sequence_length
    per_rank = topology.micro_batch_size * topology.num_micro_batches
    rng = np.random.default_rng((step, dp_rank))
    tokens = rng.integers(0, recipe.model.architecture.vocab_size, size=(per_rank, length + 1))
    micro_batches = [
        micro_batch_from_windows(rows, np.zeros(rows.shape, dtype=np.bool_), restart_positions=False)
        for rows in np.split(tokens, topology.num_micro_batches)
    ]
    return StepBatch(micro_batches, topology.global_batch_size * length, "benchmark", ["random"] * per_rank)


class OurLoop:
    """`TrainingEngine.train_step` on batches made beforehand."""

    def __init__(self, recipe: Recipe, topology: Topology, context: EngineContext) -> None:
        self.engine = TrainingEngine(recipe, topology, context)
        initialize_weights(self.engine.built)
        batches = synthetic_batch if recipe.model.architecture.use_doc_masking else whole_window_batch
        self._batches = [batches(recipe, topology, step, context.dp_rank) for step in range(NUM_BATCHES)]
        self._steps = 0

    def step(self) -> float:
        """One optimizer step; returns the loss over the global batch."""
        batch = self._batches[self._steps % NUM_BATCHES]
        self._steps += 1
        return self.engine.train_step(batch, LEARNING_RATE).loss

    def hf_weights(self) -> dict[str, torch.Tensor]:
        """Copies of the weights by transformers' names (the model must not be split)."""
        buckets = self.engine.built.buckets
        ours = {slot.name: slot.view(bucket.parameters) for bucket in buckets for slot in bucket.slots}
        return {
            name: tensor.clone()
            for entry in parameter_map(self.engine.recipe)
            for name, tensor in split_to_hf(entry, ours[entry.name])
        }


@dataclass
class _Tensors:
    input_ids: torch.Tensor
    target_ids: torch.Tensor


class BareLoop:
    """What a user of transformers writes: forward, backward, clip_grad_norm_, AdamW, under DDP."""

    def __init__(self, recipe: Recipe, topology: Topology, dp_rank: int, weights: dict[str, torch.Tensor]) -> None:
        self._model = transformers_model(recipe, weights)
        factory, excluded = recipe.optimizer.optimizer_factory, decay_rule(recipe)
        by_decay: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in self._model.named_parameters():
            by_decay[excluded(name.replace("embed_tokens", "token_embedding"))].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": by_decay[True], "weight_decay": recipe.optimizer.weight_decay},
                {"params": by_decay[False], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(factory.adam_beta1, factory.adam_beta2),
            eps=factory.adam_eps,
            fused=factory.torch_adam_is_fused,
        )
        self._max_norm = recipe.optimizer.clip_grad
        self._callable = self._model
        if topology.dp > 1:
            # Faster than DDP's default, which copies the reduced gradients once more.
            self._callable = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        batches = [whole_window_batch(recipe, topology, step, dp_rank) for step in range(NUM_BATCHES)]
        self._batches = [[_tensors(arrays) for arrays in batch.micro_batches] for batch in batches]
        self._steps = 0

    def step(self) -> float:
        """One optimizer step; returns the loss of this rank's part of the batch."""
        micro_batches = self._batches[self._steps % NUM_BATCHES]
        self._steps += 1
        assert len(micro_batches) == 1, "the whole batch of a rank is one micro-batch"
        self._optimizer.zero_grad()
        # With `shift_labels` every window has as many targets as tokens, as ours.
        loss = self._callable(
            input_ids=micro_batches[0].input_ids,
            labels=micro_batches[0].target_ids,
            shift_labels=micro_batches[0].target_ids,
            use_cache=False,
        ).loss
        loss.backward()
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        return float(loss.item())


def transformers_model(recipe: Recipe, weights: dict[str, torch.Tensor]) -> Any:
    """The transformers class of the recipe's shape, with the given weights."""
    import transformers

    config = hf_config(
        recipe, dtype=recipe.model.dtype, token_ids=token_ids_of(recipe), transformers_version=transformers.__version__
    )
    name = hf_class(recipe)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.train()


def mean_over_ranks(value: float) -> float:
    """The mean of every rank's value."""
    total = torch.tensor(value, dtype=torch.float64)
    torch_dist.all_reduce(total)
    return float(total) / torch_dist.get_world_size()


def _tensors(arrays: MicroBatch) -> _Tensors:
    return _Tensors(torch.from_numpy(arrays.input_ids).contiguous(), torch.from_numpy(arrays.target_ids).contiguous())
