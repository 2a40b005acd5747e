"""Attention and rotary positions against their definitions."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import naive_attention, positions_of

import model.attention
from model.attention import (
    AttentionBackend,
    AttentionInputs,
    attention_inputs,
    choose_attention,
    sdpa_attention,
    torch_varlen_attn,
)
from model.rope import apply_rope, rope_table

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SDPA = AttentionBackend("sdpa", "", sdpa_attention)
OFFSETS = AttentionBackend("offsets", "", sdpa_attention, takes_offsets=True)
POSITIONS = torch.stack([positions_of([1, 5, 3]), positions_of([9])])


def inputs_of(
    positions: torch.Tensor, backend: AttentionBackend, dtype: torch.dtype, mask_documents: bool
) -> AttentionInputs:
    return attention_inputs(positions, backend, dtype, mask_documents, CPU)


def random_qkv(length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa_is_the_definition_with_its_gradient(mask_documents: bool, kv_heads: int) -> None:
    ours = [tensor.requires_grad_() for tensor in random_qkv(9, kv_heads=kv_heads)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    out = sdpa_attention(*ours, inputs_of(POSITIONS, SDPA, torch.float32, mask_documents))
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
    packed = sdpa_attention(q, k, v, inputs_of(positions, SDPA, torch.float32, True))
    alone = [
        sdpa_attention(*parts, inputs_of(torch.arange(parts[0].shape[1])[None], SDPA, torch.float32, True))
        for parts in zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


def test_offsets_are_where_documents_and_sequences_start() -> None:
    positions = torch.stack([positions_of([1, 5, 3]), torch.arange(4, 13)])
    inputs = inputs_of(positions, OFFSETS, torch.bfloat16, True)
    assert inputs.mask is None and inputs.cu_seqlens is not None and inputs.cu_seqlens.dtype == torch.int32
    assert inputs.cu_seqlens.tolist() == [0, 1, 6, 9, 18]
    assert inputs.max_seqlen == 9


def test_without_document_masks_nothing_is_built() -> None:
    inputs = inputs_of(POSITIONS, SDPA, torch.float32, False)
    assert inputs.mask is None and inputs.cu_seqlens is None


@pytest.mark.parametrize(("requested", "reason"), [("sdpa", "asks for it"), ("flash_attention_2", "needs CUDA")])
def test_the_choice_on_a_cpu_has_a_reason(requested: str, reason: str) -> None:
    backend = choose_attention(requested, torch.bfloat16, CPU, head_dim=8)
    assert backend.name == "sdpa" and reason in backend.reason and not backend.takes_offsets


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch's flash kernel runs on, as far as one can ask, and no flash-attn."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor]) -> None:
    """Put a function in the place of torch's `varlen_attn`, which older torch lacks."""
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def naive_varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's function by its definition, for causal attention; refuses what the kernel would."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    lengths = cu_seq_q.diff().tolist()
    assert sum(lengths) == len(q) and max(lengths) <= max_q == max_k
    alone = [
        sdpa_attention(*(part.unsqueeze(0) for part in parts), AttentionInputs(None, None, 0)).squeeze(0)
        for parts in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    ]
    return torch.cat(alone)


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.usefixtures("ampere")
def test_varlen_attn_is_given_what_the_mask_says(
    mask_documents: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, naive_varlen_attn)
    chosen = choose_attention("auto", torch.bfloat16, CUDA, head_dim=8)
    assert (chosen.name, chosen.takes_offsets) == ("varlen_attn", True)
    assert chosen.reason == "torch's own; flash-attn is not installed (extra `gpu`)"
    ours = [tensor.requires_grad_() for tensor in random_qkv(9, kv_heads=kv_heads)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    inputs = inputs_of(POSITIONS, chosen, torch.float32, mask_documents)
    assert inputs.mask is None and (inputs.cu_seqlens is not None) == mask_documents
    out = chosen.function(*ours, inputs)
    expected = sdpa_attention(*theirs, inputs_of(POSITIONS, SDPA, torch.float32, mask_documents))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for tensor in (out, expected):
        (tensor * torch.arange(tensor.numel()).view(tensor.shape).sin()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("ampere")
def test_varlen_attn_of_this_torch_takes_what_it_is_given() -> None:
    """Shapes alone: its kernel needs CUDA."""
    varlen_attn = torch_varlen_attn()
    if varlen_attn is None:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn with grouped queries")
    chosen = choose_attention("auto", torch.bfloat16, CUDA, head_dim=8)
    inputs = inputs_of(POSITIONS, chosen, torch.bfloat16, True)
    assert inputs.cu_seqlens is not None
    on_meta = AttentionInputs(None, inputs.cu_seqlens.to("meta"), inputs.max_seqlen)
    q, k, v = (tensor.bfloat16().to("meta").requires_grad_() for tensor in random_qkv(9))
    out = chosen.function(q, k, v, on_meta)
    out.sum().backward()
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "is_built", "expected"),
    [
        (torch.float32, 64, (9, 0), True, "flash-attn has no float32 kernel"),
        (torch.bfloat16, 64, (7, 5), True, "needs compute capability 8.0"),
        (torch.bfloat16, 20, (9, 0), True, "needs a head size that is a multiple of 8 up to 256, not 20"),
        (torch.bfloat16, 264, (9, 0), True, "not 264"),
        (torch.bfloat16, 64, (9, 0), False, "needs a torch that was built with it"),
    ],
)
@pytest.mark.usefixtures("ampere")
def test_where_varlen_attn_cannot_run_sdpa_does_and_the_reason_is_told(
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    is_built: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    chosen = choose_attention("flash_attention_2", dtype, CUDA, head_dim=head_dim)
    assert chosen.name == "sdpa" and not chosen.takes_offsets and expected in chosen.reason
    if dtype is torch.bfloat16:
        assert chosen.reason.startswith("flash-attn is not installed (extra `gpu`), and torch's varlen_attn ")


@pytest.mark.usefixtures("ampere")
def test_an_older_torch_has_no_varlen_attn_or_one_without_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda query, key, value, is_causal=False: query)
    assert torch_varlen_attn() is None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert torch_varlen_attn() is None
    chosen = choose_attention("auto", torch.bfloat16, CUDA, head_dim=64)
    assert chosen.name == "sdpa" and f"needs a newer torch than {torch.__version__}" in chosen.reason


@pytest.mark.usefixtures("ampere")
def test_a_recipe_that_asks_for_sdpa_gets_it() -> None:
    assert choose_attention("sdpa", torch.bfloat16, CUDA, head_dim=64).reason == "the recipe asks for it"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E\\nmore of it')",
            "flash-attn cannot be imported: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E",
        ),
        ("raise OSError('libcudart.so.11.0: cannot open')", "flash-attn cannot be imported: libcudart.so.11.0: cannot"),
        ("import no_such_module_of_flash_attn", "flash-attn cannot be imported: No module named 'no_such_module_of"),
        ("flash_attn_func = None", "flash-attn cannot be imported: cannot import name 'flash_attn_varlen_func'"),
    ],
)
@pytest.mark.usefixtures("ampere")
def test_a_flash_attn_that_is_broken_is_not_chosen_and_why_is_told(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(model.attention, "torch_varlen_attn", lambda: None)
    try:
        chosen = choose_attention("flash_attention_2", torch.bfloat16, CUDA, head_dim=64)
    finally:
        sys.modules.pop("flash_attn", None)
    assert chosen.name == "sdpa" and chosen.reason.startswith(reason) and "\n" not in chosen.reason


def test_flash_attn_is_told_to_add_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def record(q: torch.Tensor, *_: object, **options: object) -> torch.Tensor:
        told.append(options["deterministic"])
        return q

    flash_attn = ModuleType("flash_attn")
    flash_attn.flash_attn_func = flash_attn.flash_attn_varlen_func = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    q, k, v = random_qkv(9)
    for wanted in (True, False):
        chosen = choose_attention("flash_attention_2", torch.bfloat16, CUDA, head_dim=8, deterministic=wanted)
        for masked in (True, False):
            chosen.function(q, k, v, inputs_of(POSITIONS, chosen, torch.bfloat16, masked))
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
