"""Does an export compute what the checkpoint computes?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.hf_export import verify_export
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit in float32 that rounding explains."""
_LENGTH = 64


def verify_checkpoint(checkpoint: Path, recipe: Recipe, out: Path) -> float:
    """Largest absolute difference of a logit between our model with the checkpoint's weights and transformers' from
    `out`, both in float32 on the same real text; to be compared with LOGIT_TOLERANCE."""
    import torch

    from model.build import logits_from_tensors
    from parallel.checkpoint import read_tensors

    in_float32 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(checkpoint):
            yield name, tensor.to(torch.float32)

    return verify_export(
        out,
        lambda token_ids: logits_from_tensors(in_float32, tensors(), token_ids),
        verification_tokens(out, recipe.model.architecture.vocab_size),
    )


def verification_tokens(out: Path, vocab_size: int) -> torch.Tensor:
    """int64 [2, 64] of Python's documentation and code in the export's tokens; without a tokenizer, of its bytes."""
    import inspect
    import textwrap
    from pydoc_data.topics import topics

    import torch

    texts = [topics["with"], inspect.getsource(textwrap)]
    if (out / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    else:
        rows = [[byte % vocab_size for byte in text.encode()] for text in texts]
    length = min(_LENGTH, *map(len, rows))
    return torch.tensor([row[:length] for row in rows])
