"""The normalizations from PyTorch's own operators: what runs without Triton, and what second derivatives go through."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import (
    layer_norm as torch_layer_norm,  # bound here: torch.nn.functional's may be replaced
)
from torch.nn.functional import rms_norm as torch_rms_norm

from fastattn.dispatch import autocasts
from fastattn.ops._autograd import needs_graph


def residual_sum(
    x: Tensor, residual: Tensor | None, rowscale: Tensor | None, dropout_p: float, dtype: torch.dtype
) -> Tensor:
    """residual + rowscale * dropout(x) in `dtype`, in as few passes as PyTorch's operators allow."""
    branch = torch.dropout(x, dropout_p, train=True) if dropout_p else x
    if rowscale is not None:
        rowscale = rowscale.reshape(rowscale.shape + (1,) * (x.dim() - rowscale.dim()))
    if residual is None:
        return (branch if rowscale is None else branch * rowscale).to(dtype)
    if residual.dtype != dtype:
        common = torch.promote_types(x.dtype, residual.dtype)
        if torch.promote_types(common, dtype) != common:
            residual = residual.to(dtype)  # or the sum would be rounded before it is stored
    total = residual + branch if rowscale is None else torch.addcmul(residual, branch, rowscale)
    return total.to(dtype)


def normalize(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    zero_centered: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """LayerNorm or RMSNorm of any mixture of dtypes, rounded once."""
    if zero_centered and weight is not None:
        weight = 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    dtype = x.dtype
    if rms and eps is None:
        # PyTorch takes that of the dtype it is given, which beside a float64 weight would be another.
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    weight_dtype = dtype if weight is None else weight.dtype
    bias_dtype = dtype if bias is None else bias.dtype
    alike = out_dtype == dtype == weight_dtype == bias_dtype
    if alike and x.is_cpu:
        return plain(x, shape, weight, bias, eps, rms)
    with _without_autocast(x):
        if alike:
            return plain(x, shape, weight, bias, eps, rms)
        # PyTorch's operators take few mixtures of dtypes, and which ones depends on the device. The CPU's reads
        # 16-bit x beside float32 parameters, so that no wide copy of x is made. Where these need gradients, it would
        # sum them over the rows in x's dtype.
        parameters = {t.dtype for t in (weight, bias) if t is not None}
        native = x.is_cpu and dtype.itemsize == 2 and out_dtype == dtype and parameters == {torch.float32}
        if native and not rms and not needs_graph(weight, bias):
            return plain(x, shape, weight, bias, eps, rms)
        wide = torch.promote_types(torch.promote_types(dtype, weight_dtype), bias_dtype)
        wide = torch.promote_types(wide, out_dtype)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
        return plain(x.to(wide), shape, weight, bias, eps, rms).to(out_dtype)


def plain(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> Tensor:
    """PyTorch's own function."""
    if rms:
        return torch_rms_norm(x, shape, weight, eps)
    return torch_layer_norm(x, shape, weight, bias, eps)  # type: ignore[arg-type]


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """What autocast asks for is in `out_dtype` already; the CPU's asks for nothing."""
    if x.device.type == "cpu" or not autocasts(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def statistics(x: Tensor, dims: int, eps: float | None, rms: bool) -> tuple[Tensor, ...]:
    """(rstd,) of RMSNorm or (mean, rstd) of LayerNorm, in float32, or float64 of a float64 x."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    over = tuple(range(-dims, 0))
    if rms:
        return (
            torch.rsqrt(wide.square().mean(over) + (torch.finfo(wide.dtype).eps if eps is None else eps)),
        )
    variance, mean = torch.var_mean(wide, over, correction=0)
    return mean, torch.rsqrt(variance + (eps or 0.0))
