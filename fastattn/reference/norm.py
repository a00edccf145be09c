"""Normalization by its formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the trailing `normalized_shape` dimensions.

    Computed in float32 where x is narrower, as every implementation does.
    """
    dims = _dims(normalized_shape)
    wide = _widened(x)
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return _scaled(y, weight, bias, zero_centered_weight).to(out_dtype or x.dtype)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the trailing `normalized_shape` dimensions.

    An eps of None is that of the dtype computed in: float32's where x is narrower.
    """
    wide = _widened(x)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    y = wide * torch.rsqrt(wide.square().mean(_dims(normalized_shape), keepdim=True) + eps)
    return _scaled(y, weight, None, zero_centered_weight).to(out_dtype or x.dtype)


def residual_sum(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + rowscale * dropout(x), rounded once: what the add_ forms normalize and return.

    `keep`, a boolean of x's shape, says what dropout keeps; without it that is drawn. `rowscale` has x's leading
    dimensions.
    """
    dtype = residual_dtype or (x if residual is None else residual).dtype
    total = x.to(torch.promote_types(_widened(x).dtype, dtype))
    if keep is not None:
        total = total * keep / (1.0 - dropout_p) if dropout_p < 1.0 else total * 0.0
    elif dropout_p > 0.0:
        total = torch.dropout(total, dropout_p, train=True)
    if rowscale is not None:
        total = total * rowscale.reshape(rowscale.shape + (1,) * (x.dim() - rowscale.dim()))
    if residual is not None:
        total = total + residual
    return total.to(dtype)


def _dims(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    return tuple(range(-count, 0))


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, zero_centered: bool) -> Tensor:
    if weight is not None:
        y = y * (1.0 + _widened(weight) if zero_centered else weight)
    return y if bias is None else y + bias
