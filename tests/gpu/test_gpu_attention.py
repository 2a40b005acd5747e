"""Attention on CUDA: every backend against the definition."""

import pytest
import torch
from naive_attention import naive_attention, positions_of

from model.attention import (
    AttentionBackend,
    attention_inputs,
    choose_attention,
    flash_attention_is_installed,
    sdpa_attention,
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
    inputs = attention_inputs(POSITIONS.to(device), backend, dtype, mask_documents)
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
    """flash-attn where it is installed; otherwise the reason says that it is not."""
    backend = choose_attention("flash_attention_2", torch.bfloat16, device)
    expected = "flash_attention_2" if flash_attention_is_installed() else "sdpa"
    assert backend.name == expected and "installed" in backend.reason
    check(backend, torch.bfloat16, device, mask_documents, 2e-2)


def test_float32_never_takes_flash_attn(device: torch.device) -> None:
    backend = choose_attention("flash_attention_2", torch.float32, device)
    assert backend.name == "sdpa" and "float32" in backend.reason
