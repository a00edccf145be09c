"""How correctness is judged: inputs, tolerances, and the comparison with PyTorch's own error.

The rule: against the truth (a float64 reference on the same rounded inputs), an implementation's error is at
most twice that of PyTorch in the same dtype, plus an absolute floor from one table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A floor for results that PyTorch happens to round exactly: a unit in the last place of the largest value, times 4
# because the sums behind a result are made in another order.
ATOL = {
    torch.float64: 4 * 2.0**-52,
    torch.float32: 4 * 2.0**-23,
    torch.bfloat16: 4 * 2.0**-8,
    torch.float16: 4 * 2.0**-11,
}

# Relative error in the mean square: a few roundings to the dtype; above it something is wrong, not rounded.
RMS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Standard normal values, the same for a seed on every device and in every dtype up to rounding.

    Args:
        strides: memory layout in elements; gaps between the elements hold NaN, so that a kernel that reads
            them shows it.
    """
    if torch.device(device).type == "meta":
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=requires_grad)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device, requires_grad=requires_grad)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    if strides is None:
        return values.to(device).requires_grad_(requires_grad)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = torch.full((extent,), math.nan, dtype=dtype)
    tensor = buffer.as_strided(shape, tuple(strides)).copy_(values)
    # .to(device) keeps neither gaps nor their NaN for a view; move the buffer instead.
    moved = buffer.to(device).as_strided(tensor.shape, tensor.stride())
    return moved.requires_grad_(requires_grad)


def assert_accurate(
    actual: Tensor,
    peer: Tensor,
    truth: Tensor,
    *,
    name: str = "result",
    factor: float = 2.0,
    growth: float = 1.0,
    scale: float = 0.0,
) -> None:
    """Asserts that `actual` is as near to the truth as a peer's result in the same dtype.

    Args:
        actual: the result to judge.
        peer: PyTorch's result in the same dtype on the same inputs.
        truth: the reference in float64 on the same rounded inputs.
        name: what the message calls the result.
        factor: how many times the peer's error is allowed.
        growth: multiplies the absolute floor; sqrt(M) for a sum over M terms of size one.
        scale: the size of the terms that a result is a sum of, where they may cancel to much less.

    Raises:
        AssertionError: shape, dtype, finiteness or error differ; the message shows both errors.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
    if actual.dtype != peer.dtype:
        raise AssertionError(f"{name} has {actual.dtype}, not {peer.dtype}")
    if actual.numel() == 0:
        return
    actual_wide, peer_wide, truth = (t.detach().double().cpu() for t in (actual, peer, truth))
    finite = truth.isfinite()
    if not torch.allclose(actual_wide[~finite], truth[~finite], equal_nan=True):
        raise AssertionError(f"{name} differs where the truth is infinite or NaN")
    if not actual_wide[finite].isfinite().all():
        raise AssertionError(f"{name} holds infinities or NaN where the truth is finite")
    error = (actual_wide - truth)[finite].abs()
    peer_error = (peer_wide - truth)[finite].abs()
    if error.numel() == 0:
        return
    floor = ATOL[actual.dtype] * max(truth[finite].abs().max().item(), scale) * growth
    allowed = factor * peer_error.max().item() + floor
    if not error.max().item() <= allowed:
        raise AssertionError(
            f"{name}: largest error {error.max():.3e} is above {allowed:.3e} "
            f"= {factor} x PyTorch's {peer_error.max():.3e} + {floor:.1e}"
        )
    norm = truth[finite].square().mean().sqrt().item()
    rms, peer_rms = (e.square().mean().sqrt().item() for e in (error, peer_error))
    allowed_rms = factor * peer_rms + RMS[actual.dtype] * norm + ATOL[actual.dtype] * scale * growth
    if not rms <= allowed_rms:
        raise AssertionError(f"{name}: root mean square error {rms:.3e} is above {allowed_rms:.3e}")
