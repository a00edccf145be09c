"""LayerNorm and RMSNorm forward over rows of any width, alone or with the residual sum before them.

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
from fastattn.kernels._arguments import Matrix, dropout_of
from fastattn.kernels._config import ceil_div
from fastattn.kernels._dropout import _dropped_rows
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._norm_config import NormConfig, select_norm_forward_config
from fastattn.kernels._norm_tiles import (
    _combine_moments,
    _load_column,
    _load_scale,
    _load_shift,
    _load_tile,
    _moments,
    _multiple_of,
    _rows_of,
    _store_tile,
)
from fastattn.kernels._plan import Constants, RowsPlan, planned, rows_read
from fastattn.kernels._target import Target


@triton.jit
def _summed_tile(x_rows, residual_rows, sum_rows, rowscale, dropout, rows, start, inside):
    """A float32 tile of what is normalized: x itself or, with sum_rows, the residual sum, which is stored there.

    Normalized is the sum as it is stored, rounded: y and its gradient are then those of the residual_out that the
    caller holds, and the backward reads it.
    """
    columns = start + tl.arange(0, inside.shape[1])
    tile = _load_tile(x_rows, columns, inside)
    if sum_rows is not None:
        if dropout is not None:
            tile = _dropped_rows(tile, dropout, rows, start)
        if rowscale is not None:
            tile *= rowscale
        if residual_rows is not None:
            tile += _load_tile(residual_rows, columns, inside)
        rounded = tile.to(sum_rows.dtype.element_ty)
        tl.store(sum_rows + columns[None, :], rounded, mask=inside)
        tile = rounded.to(tl.float32)
    return tile


@triton.jit
def _store_normalized(
    y_rows, x, mean, rstd, weight_ptr, bias_ptr, columns, inside, WIDTH, ZERO_CENTERED: tl.constexpr
):
    """y = (x - mean) * rstd * weight + bias (Ba et al., 2016, eq. 4) of one tile."""
    y = (x - mean[:, None]) * rstd[:, None]
    y *= _load_scale(weight_ptr, columns, WIDTH, x.shape[0], ZERO_CENTERED)
    y += _load_shift(bias_ptr, columns, WIDTH, x.shape[0])
    _store_tile(y_rows, y, columns, inside)


@triton.jit(do_not_specialize=["ROWS"])
def _norm_forward_kernel(
    x,
    residual,
    weight_ptr,
    bias_ptr,
    rowscale_ptr,
    dropout,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    ROWS,
    WIDTH,
    eps,
    ZERO_CENTERED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program normalizes BLOCK_M rows, BLOCK_N columns at a time; grid (cdiv(ROWS, BLOCK_M),).

    x and residual are matrices with unit column stride; y and the sum are contiguous, mean and rstd (ROWS,) in
    float32. Without mean_ptr it is RMSNorm, without sum_ptr x itself is normalized; what else is None is left out.
    ALIGNMENT divides WIDTH and the row strides.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    CENTERED: tl.constexpr = mean_ptr is not None
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    x_rows = _rows_of(x, rows, ALIGNMENT)  # (BLOCK_M, 1)
    y_rows = y_ptr + rows[:, None] * WIDTH
    residual_rows = None
    if residual is not None:
        residual_rows = _rows_of(residual, rows, ALIGNMENT)
    sum_rows, kept_rows = None, x_rows
    if sum_ptr is not None:
        sum_rows = sum_ptr + rows[:, None] * WIDTH
        kept_rows = sum_rows
    rowscale = None
    if rowscale_ptr is not None:
        rowscale = _load_column(rowscale_ptr, rows, row_inside)
    columns = tl.arange(0, BLOCK_N)
    inside = row_inside[:, None] & (columns < WIDTH)[None, :]  # (BLOCK_M, BLOCK_N): the last tile overruns
    first = _summed_tile(x_rows, residual_rows, sum_rows, rowscale, dropout, rows, 0, inside)

    # From here on values are distances from a number near the mean: where the mean is large and the variance
    # small, they keep the digits that x itself would lose in float32.
    count = tl.minimum(WIDTH, BLOCK_N).to(tl.float32)
    pivot = tl.zeros((BLOCK_M,), tl.float32)
    if CENTERED:
        pivot = tl.sum(first, axis=1) / count
        first = tl.where(inside, first - pivot[:, None], 0.0)
    mean, squares = _moments(first, inside, count, CENTERED)
    if not ONE_TILE:
        for start in range(BLOCK_N, WIDTH, BLOCK_N):
            tile_inside = row_inside[:, None] & (start + columns < WIDTH)[None, :]
            tile = _summed_tile(x_rows, residual_rows, sum_rows, rowscale, dropout, rows, start, tile_inside)
            tile = tl.where(tile_inside, tile - pivot[:, None], 0.0)
            count = tl.minimum(WIDTH - start, BLOCK_N).to(tl.float32)
            tile_mean, tile_squares = _moments(tile, tile_inside, count, CENTERED)
            mean, squares = _combine_moments(mean, squares, start, tile_mean, tile_squares, count)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if CENTERED:
        tl.store(mean_ptr + rows, pivot + mean, mask=row_inside)
    tl.store(rstd_ptr + rows, rstd, mask=row_inside)

    _store_normalized(y_rows, first, mean, rstd, weight_ptr, bias_ptr, columns, inside, WIDTH, ZERO_CENTERED)
    if not ONE_TILE:
        if sum_ptr is not None:
            # A thread may read what another has stored.
            tl.debug_barrier()
        for start in range(BLOCK_N, WIDTH, BLOCK_N):
            tile_columns = start + columns
            tile_inside = row_inside[:, None] & (tile_columns < WIDTH)[None, :]
            tile = _load_tile(kept_rows, tile_columns, tile_inside) - pivot[:, None]
            _store_normalized(
                y_rows,
                tile,
                mean,
                rstd,
                weight_ptr,
                bias_ptr,
                tile_columns,
                tile_inside,
                WIDTH,
                ZERO_CENTERED,
            )


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rowscale: Tensor | None,
    dropout_seed: Tensor | None,
    dims: int,
    eps: float,
    centered: bool,
    zero_centered: bool,
    dropout_p: float,
    sum_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    *,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = (h - mean) * rstd * weight + bias over the last `dims` dimensions, h = residual + rowscale * dropout(x).

    Args:
        x: (..., *normalized_shape), any strides; rows at unequal distances are copied.
        residual: of x's shape, or None for zeros.
        weight, bias: (*normalized_shape) in any of Triton's dtypes, or None.
        rowscale: of x's leading dimensions, or None for ones.
        dropout_seed: (2,), int64; None for no dropout.
        dims: how many trailing dimensions are normalized over.
        centered: LayerNorm; else RMSNorm, without a mean.
        zero_centered: 1 + weight stands for weight.
        dropout_p: the probability that dropout drops an element of x.
        sum_dtype: in which h is stored, and rounded before it is normalized. None: h is x, and residual, rowscale and
            dropout are not looked at.
        out_dtype: of y.
        config: replaces the selected launch config.

    Returns:
        y and h, contiguous; mean and rstd of x's leading dimensions, in float32. An empty tensor stands for an h that
        is x, and for the mean of RMSNorm.
    """
    if sum_dtype is None:
        residual = rowscale = dropout_seed = None
    rstd = x.new_empty(x.shape[:-dims], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else rstd.new_empty(0)
    y = empty_contiguous(x, out_dtype)
    summed = x.new_empty(0) if sum_dtype is None else empty_contiguous(x, sum_dtype)
    if x.numel() == 0:
        # Rows of width 0, if there are any: the mean of nothing is 0 / 0.
        return y, summed, mean.fill_(math.nan), rstd.fill_(math.nan)
    plan = _plan(
        x.shape,
        x.stride(),
        x.dtype,
        None if residual is None else residual.stride(),
        None if residual is None else residual.dtype,
        dropout_seed is not None,
        dims,
        config,
        _target.target_of(x.device),
    )
    with _target.launching_on(x):
        launch(
            _norm_forward_kernel,
            plan.grid,
            plan.constants,
            x=Matrix(plan.read(0, x), plan.distances[0]),
            residual=None if residual is None else Matrix(plan.read(1, residual), plan.distances[1]),
            weight_ptr=None if weight is None else weight.contiguous(),
            bias_ptr=None if bias is None else bias.contiguous(),
            rowscale_ptr=None if rowscale is None else rowscale.contiguous(),
            dropout=dropout_of(dropout_seed, dropout_p),
            y_ptr=y,
            sum_ptr=None if sum_dtype is None else summed,
            mean_ptr=mean if centered else None,
            rstd_ptr=rstd,
            eps=eps,
            ZERO_CENTERED=zero_centered,
        )
    return y, summed, mean, rstd


@planned
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    residual_strides: tuple[int, ...] | None,
    residual_dtype: torch.dtype | None,
    drops: bool,
    dims: int,
    config: NormConfig | None,
    target: Target,
) -> RowsPlan:
    rows, width = math.prod(shape[: len(shape) - dims]), math.prod(shape[len(shape) - dims :])
    in_place, distances = rows_read(shape, (strides, residual_strides), dims)
    alignment = math.gcd(width, *distances, 16)
    if config is None:
        heavy = drops or residual_dtype not in (None, dtype)
        config = select_norm_forward_config(width, alignment, dtype, heavy, target)
    constants = Constants(
        ROWS=rows,
        WIDTH=width,
        ONE_TILE=config.block_n >= width,
        ALIGNMENT=alignment,
        **config.tile,
    )
    return RowsPlan(in_place, distances, (ceil_div(rows, config.block_m),), constants)
