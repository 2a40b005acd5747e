"""Attention and rotary positions against their definitions."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import naive_attention, positions_of

from model.attention import AttentionBackend, attention_inputs, choose_attention, sdpa_attention
from model.rope import apply_rope, rope_table

CPU = torch.device("cpu")
SDPA = AttentionBackend("sdpa", "", sdpa_attention)
OFFSETS = AttentionBackend("offsets", "", sdpa_attention, takes_offsets=True)
POSITIONS = torch.stack([positions_of([1, 5, 3]), positions_of([9])])


def random_qkv(length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa_is_the_definition_with_its_gradient(mask_documents: bool, kv_heads: int) -> None:
    ours = [tensor.requires_grad_() for tensor in random_qkv(9, kv_heads=kv_heads)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    out = sdpa_attention(*ours, attention_inputs(POSITIONS, SDPA, torch.float32, mask_documents))
    expected = naive_attention(*theirs, POSITIONS, mask_documents)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_masked_window_is_each_document_alone(lengths: list[int]) -> None:
    q, k, v = random_qkv(sum(lengths), batch=1)
    positions = positions_of(lengths).unsqueeze(0)
    packed = sdpa_attention(q, k, v, attention_inputs(positions, SDPA, torch.float32, True))
    alone = [
        sdpa_attention(*parts, attention_inputs(torch.arange(parts[0].shape[1])[None], SDPA, torch.float32, True))
        for parts in zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


def test_offsets_are_where_documents_and_sequences_start() -> None:
    positions = torch.stack([positions_of([1, 5, 3]), torch.arange(4, 13)])
    inputs = attention_inputs(positions, OFFSETS, torch.bfloat16, True)
    assert inputs.mask is None and inputs.cu_seqlens is not None and inputs.cu_seqlens.dtype == torch.int32
    assert inputs.cu_seqlens.tolist() == [0, 1, 6, 9, 18]
    assert inputs.max_seqlen == 9


def test_without_document_masks_nothing_is_built() -> None:
    inputs = attention_inputs(POSITIONS, SDPA, torch.float32, False)
    assert inputs.mask is None and inputs.cu_seqlens is None


@pytest.mark.parametrize(("requested", "reason"), [("sdpa", "asks for it"), ("flash_attention_2", "needs CUDA")])
def test_the_choice_on_a_cpu_has_a_reason(requested: str, reason: str) -> None:
    backend = choose_attention(requested, torch.bfloat16, CPU)
    assert backend.name == "sdpa" and reason in backend.reason and not backend.takes_offsets


def test_flash_attn_is_told_to_add_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def record(q: torch.Tensor, *_: object, **options: object) -> torch.Tensor:
        told.append(options["deterministic"])
        return q

    stand_in = ModuleType("flash_attn")
    stand_in.__spec__ = ModuleSpec("flash_attn", None)
    stand_in.flash_attn_func = stand_in.flash_attn_varlen_func = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    q, k, v = random_qkv(9)
    for wanted in (True, False):
        chosen = choose_attention("flash_attention_2", torch.bfloat16, torch.device("cuda"), deterministic=wanted)
        for masked in (True, False):
            chosen.function(q, k, v, attention_inputs(POSITIONS, chosen, torch.bfloat16, masked))
    assert told == [True, True, False, False]


@pytest.mark.parametrize("theta", [1e4, 5e4, 5e6])
def test_rotation_is_that_of_transformers(theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k, _ = random_qkv(9)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, POSITIONS)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    table = rope_table(POSITIONS, 8, theta, torch.float32)
    for ours, theirs in zip((apply_rope(q, table), apply_rope(k, table)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_rotation_is_that_of_autograd() -> None:
    x = random_qkv(9)[0].double().requires_grad_()
    table = rope_table(POSITIONS, 8, 1e4, torch.float64)
    assert torch.autograd.gradcheck(lambda tensor: apply_rope(tensor, table), (x,), fast_mode=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2000), st.integers(0, 50), st.integers(0, 50))
def test_scores_of_rotated_vectors_depend_on_the_distance_only(shift: int, i: int, j: int) -> None:
    q, k, _ = (tensor[:1, :1, :1] for tensor in random_qkv(3))

    def score(q_position: int, k_position: int) -> float:
        tables = [rope_table(torch.tensor([[p]]), 8, 1e4, torch.float32) for p in (q_position, k_position)]
        return float((apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum())

    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=2e-3)
