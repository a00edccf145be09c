"""The activations' maths in 16 bits, of which the error function is a polynomial of its own."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton")

from fastattn.kernels.gelu import gelu_backward, gelu_forward

# Half a unit in the last place, a tenth more for what is before the rounding.
_RELATIVE = {torch.float16: 1.1 * 2.0**-11, torch.bfloat16: 1.1 * 2.0**-8}


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu and its derivative in float64; erfc keeps the digits of Phi that 1 + erf loses where x is negative."""
    x = x.double()
    phi = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    cdf = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * cdf, cdf + x * phi


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
def test_the_tail_of_gelu_keeps_its_digits(dtype: torch.dtype, device: torch.device) -> None:
    """To a rounding, relative to the result itself; in float16 down to where its numbers are denormal."""
    x = torch.linspace(-6.0 if dtype == torch.bfloat16 else -3.5, 6.0, 4001, device=device).to(dtype)
    y, (expected, _) = gelu_forward(x, "none").double(), exact(x)
    assert ((y - expected).abs() <= _RELATIVE[dtype] * expected.abs()).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
def test_the_derivative_of_gelu_is_exact_to_its_rounding(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.linspace(-6.0, 6.0, 4001, device=device).to(dtype)
    slope, (_, expected) = gelu_backward(torch.ones_like(x), x, "none").double(), exact(x)
    # Phi and x phi cancel near -0.75.
    assert ((slope - expected).abs() <= _RELATIVE[dtype] * expected.abs() + 1e-5).all()


def test_gelu_far_out(device: torch.device) -> None:
    """The polynomial goes on falling, so that nothing comes back; -inf times 0 is NaN, as in the formula."""
    x = torch.tensor([-1e30, -300.0, -40.0, -14.0, 40.0, 1e30, math.inf, -math.inf, math.nan], device=device)
    x = x.bfloat16()
    y, slope = gelu_forward(x, "none").float(), gelu_backward(torch.ones_like(x), x, "none").float()
    outer = torch.tensor([0.0, 0.0, 0.0, 0.0, 40.0, x[5].item(), math.inf, math.nan, math.nan])
    torch.testing.assert_close(y.cpu(), outer, atol=1e-30, rtol=0, equal_nan=True)
    inner = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(slope[:8].cpu(), torch.tensor(inner), atol=1e-30, rtol=0)
    assert slope[8].isnan()
