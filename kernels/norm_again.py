"""LayerNorm and RMSNorm of tensors like those of a call before: of which alone the addresses are not known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Matrix
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._plan import Constants
from fastattn.kernels.norm_forward import _norm_forward_kernel, _plan


class PlainNorm(NamedTuple):
    """How a norm without options is launched: of all tensors of the same shapes, strides, dtypes and device.

    Attributes:
        distances: between the rows of x, and of residual.
        rows: the shape of mean and rstd.
        centered: LayerNorm, with a mean.
        sum_dtype: of the sum of x and residual; None where there is no residual.
        constants: all arguments of the kernel but the pointers, whose alignment alone is not known.
    """

    distances: tuple[int, ...]
    rows: tuple[int, ...]
    centered: bool
    sum_dtype: torch.dtype | None
    grid: tuple[int, ...]
    constants: Constants

    def __call__(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """y, the sum, mean and rstd, as `norm_forward` has them; None for those that are not there."""
        rstd = torch.empty(self.rows, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if self.centered else None
        y = empty_contiguous(x)
        summed = None if self.sum_dtype is None else empty_contiguous(x, self.sum_dtype)
        with _target.launching_on(x):
            launch(
                _norm_forward_kernel,
                self.grid,
                self.constants,
                by=(x, residual, weight, bias, y, summed, mean, rstd),
                x=Matrix(x, self.distances[0]),
                residual=None if residual is None else Matrix(residual, self.distances[1]),
                weight_ptr=weight,
                bias_ptr=bias,
                y_ptr=y,
                sum_ptr=summed,
                mean_ptr=mean,
                rstd_ptr=rstd,
            )
        return y, summed, mean, rstd


def plain_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    centered: bool,
) -> PlainNorm | None:
    """How tensors like these are launched; None where there are no elements, or a copy is needed."""
    if x.numel() == 0 or not all(t is None or t.is_contiguous() for t in (weight, bias)):
        return None
    plan = _plan(
        x.shape,
        x.stride(),
        x.dtype,
        None if residual is None else residual.stride(),
        None if residual is None else residual.dtype,
        False,
        dims,
        None,
        _target.target_of(x.device),
    )
    if not plan.in_place[0] or (residual is not None and not plan.in_place[1]):
        return None
    constants = Constants(plan.constants, rowscale_ptr=None, dropout=None, eps=eps, ZERO_CENTERED=False)
    sum_dtype = None if residual is None else residual.dtype
    return PlainNorm(plan.distances, tuple(x.shape[:-dims]), centered, sum_dtype, plan.grid, constants)
