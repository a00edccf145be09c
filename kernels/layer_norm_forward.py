"""LayerNorm forward over rows of any width, and what the backward shares with it.

A row that fits one tile is read once. A wider one is walked in column tiles: the first stays in registers,
the others are read a second time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._norm_config import LayerNormConfig, select_layer_norm_forward_config


@triton.jit
def _multiple_of(size, ALIGNMENT: tl.constexpr):
    """The size itself, which ALIGNMENT divides, in a form that shows it to the compiler.

    Loads are as wide as what it knows of the sizes. Triton itself tells only multiples of 16 apart, where 8
    elements of 16 bits are a 16-byte load, and `tl.multiple_of` does not reach a kernel's arguments.
    """
    return size // ALIGNMENT * ALIGNMENT


@triton.jit
def _load_tile(rows_ptr, columns, inside):
    """A float32 tile (BLOCK_M, BLOCK_N) of the rows that start at rows_ptr (BLOCK_M, 1); zero outside."""
    return tl.load(rows_ptr + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(rows_ptr, tile, columns, inside):
    tl.store(rows_ptr + columns[None, :], tile.to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_parameter(ptr, columns, WIDTH, BLOCK_M: tl.constexpr):
    """A float32 row (1, BLOCK_N) of weight or bias; the last column tile overruns."""
    inside = columns < WIDTH
    if BLOCK_M == 1:
        # As a matrix of the tile's own shape it is given the tile's layout also where the dtypes differ: no
        # exchange through shared memory, which spilled in bfloat16 rows of 32,768 with a float32 weight.
        return tl.load(ptr + columns[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    else:
        # Among several rows that would take 50 registers more in the backward.
        return tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _moments(x, inside, count):
    """Mean of each row of a tile and its sum of squared distances from that mean: two passes in registers."""
    mean = tl.sum(x, axis=1) / count
    distance = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.sum(distance * distance, axis=1)


@triton.jit
def _combine_moments(mean_a, squares_a, count_a, mean_b, squares_b, count_b):
    """Moments of two sets of values from the moments of each (Chan, Golub and LeVeque, 1979, eq. 2.1)."""
    share = count_b / (count_a + count_b)
    delta = mean_b - mean_a
    return mean_a + delta * share, squares_a + squares_b + delta * delta * (share * count_a)


@triton.jit
def _scale_and_shift(
    x_hat, weight_ptr, bias_ptr, columns, WIDTH, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """x_hat * weight + bias of one tile."""
    if HAS_WEIGHT:
        x_hat *= _load_parameter(weight_ptr, columns, WIDTH, x_hat.shape[0])
    if HAS_BIAS:
        x_hat += _load_parameter(bias_ptr, columns, WIDTH, x_hat.shape[0])
    return x_hat


@triton.jit(do_not_specialize=["ROWS"])
def _layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    ROWS,
    WIDTH,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program normalizes BLOCK_M rows, BLOCK_N columns at a time; grid (cdiv(ROWS, BLOCK_M),).

    x has unit column stride, y is contiguous, mean and rstd are (ROWS,) in float32. ALIGNMENT divides WIDTH
    and the row stride.
    """
    stride_xm, WIDTH = _multiple_of(stride_xm, ALIGNMENT), _multiple_of(WIDTH, ALIGNMENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    x_ptr += rows[:, None] * stride_xm  # (BLOCK_M, 1)
    y_ptr += rows[:, None] * WIDTH
    columns = tl.arange(0, BLOCK_N)
    inside = row_inside[:, None] & (columns < WIDTH)[None, :]  # (BLOCK_M, BLOCK_N): the last tile overruns
    first = _load_tile(x_ptr, columns, inside)  # (BLOCK_M, BLOCK_N)

    # From here on values are distances from a number near the mean: where the mean is large and the variance
    # small, they keep the digits that x itself would lose in float32.
    count = tl.minimum(WIDTH, BLOCK_N).to(tl.float32)
    shift = tl.sum(first, axis=1) / count  # (BLOCK_M,)
    first = tl.where(inside, first - shift[:, None], 0.0)
    mean, squares = _moments(first, inside, count)
    if not ONE_TILE:
        for start in range(BLOCK_N, WIDTH, BLOCK_N):
            tile_inside = row_inside[:, None] & (start + columns < WIDTH)[None, :]
            tile = _load_tile(x_ptr, start + columns, tile_inside)
            tile = tl.where(tile_inside, tile - shift[:, None], 0.0)
            count = tl.minimum(WIDTH - start, BLOCK_N).to(tl.float32)
            tile_mean, tile_squares = _moments(tile, tile_inside, count)
            mean, squares = _combine_moments(mean, squares, start, tile_mean, tile_squares, count)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    tl.store(mean_ptr + rows, shift + mean, mask=row_inside)
    tl.store(rstd_ptr + rows, rstd, mask=row_inside)

    # y = (x - mean) * rstd * weight + bias (Ba et al., 2016, eq. 4).
    y = (first - mean[:, None]) * rstd[:, None]
    y = _scale_and_shift(y, weight_ptr, bias_ptr, columns, WIDTH, HAS_WEIGHT, HAS_BIAS)
    _store_tile(y_ptr, y, columns, inside)
    if not ONE_TILE:
        for start in range(BLOCK_N, WIDTH, BLOCK_N):
            tile_inside = row_inside[:, None] & (start + columns < WIDTH)[None, :]
            y = _load_tile(x_ptr, start + columns, tile_inside) - shift[:, None]
            y = (y - mean[:, None]) * rstd[:, None]
            y = _scale_and_shift(y, weight_ptr, bias_ptr, start + columns, WIDTH, HAS_WEIGHT, HAS_BIAS)
            _store_tile(y_ptr, y, start + columns, tile_inside)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    *,
    config: LayerNormConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) * rstd * weight + bias over the last `dims` dimensions.

    Args:
        x: (..., *normalized_shape), any strides; rows at unequal distances are copied.
        weight, bias: (*normalized_shape) in any of Triton's dtypes, or None.
        dims: how many trailing dimensions are normalized over.
        config: replaces the selected launch config.

    Returns:
        y in x's dtype, contiguous; mean and rstd of x's leading dimensions, in float32.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(x.shape[: x.dim() - dims], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows, width = mean.numel(), math.prod(x.shape[x.dim() - dims :])
    if x.numel() == 0:
        # Rows of width 0, if there are any: the mean of nothing is 0 / 0.
        return y, mean.fill_(math.nan), rstd.fill_(math.nan)
    x = as_rows(x, rows, width)
    alignment = math.gcd(width, x.stride(0), 16)
    if config is None:
        config = select_layer_norm_forward_config(width, alignment, x.dtype, _target.target_of(x.device))
    with _target.launching_on(x):
        _layer_norm_forward_kernel[(triton.cdiv(rows, config.block_m),)](
            x_ptr=x,
            weight_ptr=None if weight is None else weight.contiguous(),
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            stride_xm=x.stride(0),
            ROWS=rows,
            WIDTH=width,
            eps=eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ONE_TILE=config.block_n >= width,
            ALIGNMENT=alignment,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def as_rows(tensor: Tensor, rows: int, width: int) -> Tensor:
    """The tensor as a (rows, width) matrix with unit column stride: a view where it can be one, or a copy."""
    matrix = tensor.reshape(rows, width)
    return matrix if width == 1 or matrix.stride(1) == 1 else matrix.contiguous()
