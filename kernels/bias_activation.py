"""activation(x + bias) over rows, forward and backward; the backward sums the bias's gradient while it writes x's.

A fixed number of programs walk the rows. Each sums its share of dbias in registers, and a second kernel adds up the
programs' sums in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._activation import _activate, _through_activation
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._norm_tiles import _column_tile, _load_tile, _multiple_of, _store_tile
from fastattn.kernels._partials import sum_partials
from fastattn.kernels._pointwise_config import (
    TileConfig,
    WalkConfig,
    tile_plan,
    walk_plan,
)


@triton.jit
def _tile_of(program, ROWS, WIDTH, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M,), int64, and columns (BLOCK_N,) of a program's tile, and which of it lies inside the matrix.

    The tiles of a row are neighbours on one grid axis, because the others end at 65,535.
    """
    column_tiles = tl.cdiv(WIDTH, BLOCK_N)
    rows = (program // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns, (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _load_bias(bias_ptr, columns, WIDTH):
    """A float32 row (1, BLOCK_N) of the bias; the last column tile overruns."""
    return tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["ROWS"])
def _bias_activation_forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    stride_xm,
    ROWS,
    WIDTH,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes a tile of y; grid (row tiles * column tiles,). y is contiguous, x has unit column stride."""
    WIDTH, stride_xm = _multiple_of(WIDTH, ALIGNMENT), _multiple_of(stride_xm, ALIGNMENT)
    rows, columns, inside = _tile_of(tl.program_id(0), ROWS, WIDTH, BLOCK_M, BLOCK_N)
    x = _load_tile(x_ptr + rows[:, None] * stride_xm, columns, inside)  # (BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        x += _load_bias(bias_ptr, columns, WIDTH)
    y = _activate(x, ACTIVATION, y_ptr.dtype.element_ty)
    _store_tile(y_ptr + rows[:, None] * WIDTH, y, columns, inside)


@triton.jit(do_not_specialize=["ROWS"])
def _bias_activation_backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    y_ptr,
    partials_ptr,
    stride_dym,
    stride_xm,
    ROWS,
    WIDTH,
    ACTIVATION: tl.constexpr,
    TILES_ON_TWO_AXES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program walks its share of the rows, BLOCK_M at a time; grid of `walk_grid`.

    It writes dx and y, where these are given, and its sums for dbias to its row of partials_ptr, (programs, WIDTH) in
    float32. dx and y are contiguous, dy and x have unit column strides.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty  # of dx and y too
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    stride_dym, stride_xm = _multiple_of(stride_dym, ALIGNMENT), _multiple_of(stride_xm, ALIGNMENT)
    program = tl.program_id(0).to(tl.int64)
    columns = _column_tile(TILES_ON_TWO_AXES) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = columns < WIDTH  # (BLOCK_N,): the last tile overruns
    if bias_ptr is not None:
        bias = _load_bias(bias_ptr, columns, WIDTH)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(program * BLOCK_M, ROWS, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES):
        rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (rows < ROWS)[:, None] & column_inside[None, :]  # the last block of rows overruns
        dy = _load_tile(dy_ptr + rows[:, None] * stride_dym, columns, inside)  # (BLOCK_M, BLOCK_N)
        x = _load_tile(x_ptr + rows[:, None] * stride_xm, columns, inside)
        if bias_ptr is not None:
            x += bias
        # dy is zero outside, but 0 * NaN would not be: a NaN of bias reaches its own column alone, which has it anyway.
        dx = _through_activation(dy, x, ACTIVATION, dtype)
        if partials_ptr is not None:
            dbias += dx
        if dx_ptr is not None:
            _store_tile(dx_ptr + rows[:, None] * WIDTH, dx, columns, inside)
        if y_ptr is not None:
            _store_tile(y_ptr + rows[:, None] * WIDTH, _activate(x, ACTIVATION, dtype), columns, inside)
    if partials_ptr is not None:
        tl.store(partials_ptr + program * WIDTH + columns, tl.sum(dbias, axis=0), mask=column_inside)


def bias_activation_forward(
    x: Tensor, bias: Tensor | None, activation: str, *, config: TileConfig | None = None
) -> Tensor:
    """y = activation(x + bias), in x's dtype, contiguous.

    Args:
        x: (..., width), any strides; rows at unequal distances are copied.
        bias: (width,), any floating dtype, or None.
        activation: a name of `fastattn.kernels._activation`.
        config: replaces the selected launch config.
    """
    y = empty_contiguous(x)
    if x.numel() == 0:
        return y
    plan = tile_plan(x.shape, (x.stride(),), x.dtype, 1, config, _target.target_of(x.device))
    with _target.launching_on(x):
        launch(
            _bias_activation_forward_kernel,
            plan.grid,
            plan.constants,
            x_ptr=plan.read(0, x),
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            stride_xm=plan.distances[0],
            ACTIVATION=activation,
        )
    return y


def bias_activation_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    need_dx: bool,
    dbias_dtype: torch.dtype | None,
    need_y: bool,
    *,
    config: WalkConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `bias_activation_forward`'s y, and y again.

    Args:
        dy, x: (..., width), any strides; rows at unequal distances are copied.
        bias, activation: as in the forward.
        need_dx: whether dx is computed.
        dbias_dtype: the dtype that the sum of dx over the rows is returned in; None: it is not computed.
        need_y: whether y is written too, for a caller that has not kept it.
        config: replaces the selected launch config.

    Returns:
        dx in x's dtype, contiguous, dbias and y; an empty tensor for each that is not asked for.
    """
    dx = empty_contiguous(x) if need_dx else x.new_empty(0)
    y = empty_contiguous(x) if need_y else x.new_empty(0)
    if x.numel() == 0 or not (need_dx or need_y or dbias_dtype is not None):
        return dx, x.new_zeros(0 if dbias_dtype is None else x.size(-1), dtype=dbias_dtype), y
    target = _target.target_of(x.device)
    plan = walk_plan(x.shape, (dy.stride(), x.stride()), x.dtype, config, target)
    partials = None
    if dbias_dtype is not None:
        partials = x.new_empty((plan.grid[0], x.size(-1)), dtype=torch.float32)
    with _target.launching_on(x):
        launch(
            _bias_activation_backward_kernel,
            plan.grid,
            plan.constants,
            dy_ptr=plan.read(0, dy),
            x_ptr=plan.read(1, x),
            bias_ptr=None if bias is None else bias.contiguous(),
            dx_ptr=dx if need_dx else None,
            y_ptr=y if need_y else None,
            partials_ptr=partials,
            stride_dym=plan.distances[0],
            stride_xm=plan.distances[1],
            ACTIVATION=activation,
        )
        if partials is None or dbias_dtype is None:
            return dx, x.new_empty(0), y
        return dx, sum_partials(partials, dbias_dtype, target), y
