"""Attention on CUDA: every backend against the definition."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from naive_attention import naive_attention, positions_of

from model.attention import (
    AttentionBackend,
    attention_inputs,
    choose_attention,
    sdpa_attention,
    why_no_flash_attention,
)

pytestmark = pytest.mark.gpu

POSITIONS = torch.stack([positions_of([40, 1, 23]), positions_of([64])])


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "tests marked gpu need a CUDA device"
    return torch.device("cuda", 0)


def check(
    backend: AttentionBackend, dtype: torch.dtype, device: torch.device, mask_documents: bool, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 64, generator=generator).to(device, dtype) for heads in (8, 2, 2))
    inputs = attention_inputs(POSITIONS, backend, dtype, mask_documents, device)
    out = backend.function(q, k, v, inputs)
    assert out.shape == q.shape and out.dtype == dtype and out.device == q.device
    expected = naive_attention(q, k, v, POSITIONS, mask_documents)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_sdpa_is_the_definition(mask_documents: bool, device: torch.device) -> None:
    sdpa = AttentionBackend("sdpa", "", sdpa_attention)
    check(sdpa, torch.float32, device, mask_documents, 1e-4)
    check(sdpa, torch.bfloat16, device, mask_documents, 2e-2)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_the_chosen_backend_is_the_definition(mask_documents: bool, device: torch.device) -> None:
    """flash-attn where its functions can be imported; otherwise the reason says why not."""
    backend = choose_attention("flash_attention_2", torch.bfloat16, device, head_dim=64)
    reason = why_no_flash_attention()
    if reason is None:
        assert backend.name == "flash_attention_2" and backend.reason == "flash-attn is installed"
    else:
        assert backend.name in ("varlen_attn", "sdpa") and reason in backend.reason
    check(backend, torch.bfloat16, device, mask_documents, 2e-2)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mask_documents", [True, False])
def test_varlen_attn_is_the_definition_with_the_gradient_of_sdpa(
    mask_documents: bool, deterministic: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    backend = choose_attention("auto", torch.bfloat16, device, head_dim=64, deterministic=deterministic)
    if backend.name != "varlen_attn":
        pytest.skip(backend.reason)
    with deterministic_algorithms(deterministic):
        check(backend, torch.bfloat16, device, mask_documents, 2e-2)
        ours, again = (gradients(backend, device, mask_documents) for _ in range(2))
    theirs = gradients(AttentionBackend("sdpa", "", sdpa_attention), device, mask_documents)
    for a, same, b in zip(ours, again, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
        assert torch.equal(a, same) or not deterministic


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(backend: AttentionBackend, device: torch.device, mask_documents: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 64, heads, 64, generator=generator).to(device, torch.bfloat16) for heads in (8, 2, 2)]
    inputs = attention_inputs(POSITIONS, backend, torch.bfloat16, mask_documents, device)
    out = backend.function(*(part.requires_grad_() for part in parts), inputs)
    (out * torch.arange(out.numel(), device=device).view(out.shape).sin()).sum().backward()
    return [part.grad for part in parts if part.grad is not None]


def test_float32_never_takes_flash_attn(device: torch.device) -> None:
    backend = choose_attention("flash_attention_2", torch.float32, device, head_dim=64)
    assert backend.name == "sdpa" and "float32" in backend.reason
