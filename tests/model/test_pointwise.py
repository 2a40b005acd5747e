"""The hand-written backward passes of RMSNorm and SwiGLU against autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from model.pointwise import rms_norm, swiglu


def value_and_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert out.dtype == dtype
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], inputs: list[torch.Tensor], half: bool
) -> None:
    """Against autograd in float64; in bfloat16 from the same rounded inputs."""
    dtype, tolerance = (torch.bfloat16, 2e-2) if half else (torch.float32, 1e-5)
    inputs = [tensor.to(dtype) for tensor in inputs]
    found = value_and_gradients(ours, inputs, dtype)
    expected = value_and_gradients(theirs, inputs, torch.float64)
    assert len(found) == len(expected) == len(inputs) + 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 4, 8)])
def test_rms_norm(shape: tuple[int, ...], half: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator), torch.rand(shape[-1:], generator=generator) + 0.5]
    check(
        lambda x, weight: rms_norm(x, weight, 1e-6),
        lambda x, weight: F.rms_norm(x, shape[-1:], weight, 1e-6),
        inputs,
        half,
    )


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_swiglu(half: bool) -> None:
    def plain(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    check(swiglu, plain, [3 * torch.randn(6, 20, generator=torch.Generator().manual_seed(0))], half)


def test_the_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert x.grad is not None and not out.any() and bool(torch.isfinite(x.grad).all())
