"""GELU, forward and backward: one pass over memory each, any layout without holes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._activation import _activate, _through_activation
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._plan import Constants, planned
from fastattn.kernels._pointwise_config import GELU_FORMS, select_gelu_config
from fastattn.kernels._target import Target


@triton.jit
def _gelu_forward_kernel(x_ptr, y_ptr, SIZE, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes BLOCK neighbouring elements; grid (cdiv(SIZE, BLOCK),)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE - start  # (BLOCK,): the last program overruns
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + start + offsets, _activate(x, ACTIVATION, dtype).to(dtype), mask=inside)


@triton.jit
def _gelu_backward_kernel(dy_ptr, x_ptr, dx_ptr, SIZE, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes BLOCK neighbouring elements of dx = dy * gelu'(x); grid (cdiv(SIZE, BLOCK),)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE - start  # (BLOCK,): the last program overruns
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    dx = _through_activation(dy, x, ACTIVATION, dtype)
    tl.store(dx_ptr + start + offsets, dx.to(dtype), mask=inside)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """y = gelu(x), elementwise, in x's dtype and, where x has no holes, x's strides."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    x = _in_layout_of(y, x)
    grid, constants = _plan(x.numel(), x.dtype, 1, approximate, _target.target_of(x.device))
    with _target.launching_on(x):
        launch(_gelu_forward_kernel, grid, constants, x_ptr=x, y_ptr=y)
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy * gelu'(x), elementwise, in x's dtype."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    x, dy = _in_layout_of(dx, x), _in_layout_of(dx, dy)
    grid, constants = _plan(x.numel(), x.dtype, 2, approximate, _target.target_of(x.device))
    with _target.launching_on(x):
        launch(_gelu_backward_kernel, grid, constants, dy_ptr=dy, x_ptr=x, dx_ptr=dx)
    return dx


@planned
def _plan(
    size: int, dtype: torch.dtype, tensors: int, approximate: str, target: Target
) -> tuple[tuple[int], Constants]:
    """Grid and constants of a kernel that reads so many tensors of this size."""
    config = select_gelu_config(dtype, tensors, target)
    activation = GELU_FORMS[approximate]
    constants = Constants(SIZE=size, ACTIVATION=activation, BLOCK=config.block, num_warps=config.num_warps)
    return (ceil_div(size, config.block),), constants


def _in_layout_of(dense: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself if its strides are those of `dense`, else a copy that has them.

    `torch.empty_like` keeps strides only where a tensor has neither holes nor overlaps, so equal strides mean
    that element i in memory of one is element i in memory of the other.
    """
    if tensor.stride() == dense.stride():
        return tensor
    return torch.empty_like(dense, dtype=tensor.dtype).copy_(tensor)
