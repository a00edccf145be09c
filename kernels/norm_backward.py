"""LayerNorm and RMSNorm backward over rows of any width, in one read of every tensor where a row fits a tile.

A fixed number of programs walk the rows. Each sums its share of dweight and dbias in registers, and a second
kernel adds up the programs' sums in their order, so that two runs give the same bits. Rows wider than a tile are
walked in column tiles, after a kernel that makes the two means of each row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Matrix, dropout_of
from fastattn.kernels._config import ceil_div, walk_grid
from fastattn.kernels._dropout import _dropped_rows
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._norm_config import NormBackwardConfig, select_norm_backward_config
from fastattn.kernels._norm_tiles import (
    _column_tile,
    _inverse,
    _load_column,
    _load_scale,
    _load_shift,
    _load_tile,
    _multiple_of,
    _rows_of,
    _store_tile,
    _x_hat,
)
from fastattn.kernels._partials import add_up_partials
from fastattn.kernels._plan import Constants, RowsPlan, planned, rows_read
from fastattn.kernels._target import Target


@triton.jit(do_not_specialize=["ROWS"])
def _norm_backward_kernel(
    dy,
    dresidual_out,
    kept,
    weight_ptr,
    bias_ptr,
    rowscale_ptr,
    dropout,
    mean_ptr,
    rstd_ptr,
    row_means_ptr,
    dsum_ptr,
    dx_ptr,
    partials_ptr,
    ROWS,
    WIDTH,
    CENTERED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    TILES_ON_TWO_AXES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program walks its share of the rows, BLOCK_M at a time; grid of `walk_grid`.

    `kept` is what was normalized or, FROM_OUTPUT, y. The gradient of what was normalized goes to dsum_ptr, that of the
    branch behind dropout and rowscale to dx_ptr; None: not asked for. They need whole rows in a tile, or row_means_ptr,
    (2, ROWS). The program's sums for dweight, then those for dbias, go to its rows of partials_ptr, (1 or 2, programs,
    WIDTH) in float32. dsum and dx are contiguous; dy, dresidual_out and kept have unit column strides.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    NEEDS_DX: tl.constexpr = dsum_ptr is not None or dx_ptr is not None
    program = tl.program_id(0).to(tl.int64)
    start = _column_tile(TILES_ON_TWO_AXES) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    column_inside = columns < WIDTH  # (BLOCK_N,): the last tile overruns
    scale = _load_scale(weight_ptr, columns, WIDTH, BLOCK_M, ZERO_CENTERED)
    shift = _load_shift(bias_ptr, columns, WIDTH, BLOCK_M)
    inverse = _inverse(scale, FROM_OUTPUT)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(program * BLOCK_M, ROWS, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES):
        rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
        row_inside = rows < ROWS  # (BLOCK_M,): the last block of rows overruns
        inside = row_inside[:, None] & column_inside[None, :]
        wdy = _load_tile(_rows_of(dy, rows, ALIGNMENT), columns, inside)  # (BLOCK_M, BLOCK_N)
        if NEEDS_DBIAS:
            dbias += wdy
        if NEEDS_DX or NEEDS_DWEIGHT:
            mean = _load_column(mean_ptr, rows, row_inside)
            rstd = _load_column(rstd_ptr, rows, row_inside)
            x_hat = _load_tile(_rows_of(kept, rows, ALIGNMENT), columns, inside)
            x_hat = _x_hat(x_hat, mean, rstd, inverse, shift, CENTERED, FROM_OUTPUT)
        if NEEDS_DWEIGHT:
            dweight += wdy * x_hat
        if NEEDS_DX:
            wdy *= scale
            # dy is zero outside, and with it both products.
            if row_means_ptr is None:
                mean_wdy_x_hat = (tl.sum(wdy * x_hat, axis=1) / WIDTH)[:, None]
            else:
                mean_wdy_x_hat = _load_column(row_means_ptr + ROWS, rows, row_inside)
            # rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat)): the means are the share of the gradient that flows
            # through the row's own mean and variance, which follow x.
            dsum = wdy - x_hat * mean_wdy_x_hat
            if CENTERED:
                if row_means_ptr is None:
                    dsum -= (tl.sum(wdy, axis=1) / WIDTH)[:, None]
                else:
                    dsum -= _load_column(row_means_ptr, rows, row_inside)
            dsum *= rstd
            if dresidual_out is not None:
                dsum += _load_tile(_rows_of(dresidual_out, rows, ALIGNMENT), columns, inside)
            if dsum_ptr is not None:
                _store_tile(dsum_ptr + rows[:, None] * WIDTH, dsum, columns, inside)
            if dx_ptr is not None:
                if rowscale_ptr is not None:
                    dsum *= _load_column(rowscale_ptr, rows, row_inside)
                if dropout is not None:
                    dsum = _dropped_rows(dsum, dropout, rows, start)
                _store_tile(dx_ptr + rows[:, None] * WIDTH, dsum, columns, inside)
    if NEEDS_DWEIGHT:
        dweight_ptr = partials_ptr + program * WIDTH
        tl.store(dweight_ptr + columns, tl.sum(dweight, axis=0), mask=column_inside)
    if NEEDS_DBIAS:
        dbias_ptr = partials_ptr + (program + NEEDS_DWEIGHT * tl.num_programs(0).to(tl.int64)) * WIDTH
        tl.store(dbias_ptr + columns, tl.sum(dbias, axis=0), mask=column_inside)


@triton.jit(do_not_specialize=["ROWS"])
def _norm_row_means_kernel(
    dy,
    kept,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    row_means_ptr,
    ROWS,
    WIDTH,
    CENTERED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program makes mean(weight * dy) and mean(weight * dy * x_hat) of BLOCK_M rows; grid (cdiv(ROWS, BLOCK_M),).

    They go to row_means_ptr, (2, ROWS) in float32; the rest is as in the backward kernel.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    mean = _load_column(mean_ptr, rows, row_inside)
    rstd = _load_column(rstd_ptr, rows, row_inside)
    dy_rows = _rows_of(dy, rows, ALIGNMENT)  # (BLOCK_M, 1)
    kept_rows = _rows_of(kept, rows, ALIGNMENT)
    # One sum a lane, added up once: no exchange between warps in the loop, and short chains of additions.
    sum_wdy = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_wdy_x_hat = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = row_inside[:, None] & (columns < WIDTH)[None, :]  # the last tile overruns
        scale = _load_scale(weight_ptr, columns, WIDTH, BLOCK_M, ZERO_CENTERED)
        shift = _load_shift(bias_ptr, columns, WIDTH, BLOCK_M)
        wdy = _load_tile(dy_rows, columns, inside) * scale
        x_hat = _load_tile(kept_rows, columns, inside)
        x_hat = _x_hat(x_hat, mean, rstd, _inverse(scale, FROM_OUTPUT), shift, CENTERED, FROM_OUTPUT)
        if CENTERED:
            sum_wdy += wdy
        sum_wdy_x_hat += wdy * x_hat
    if CENTERED:
        tl.store(row_means_ptr + rows, tl.sum(sum_wdy, axis=1) / WIDTH, mask=row_inside)
    tl.store(row_means_ptr + ROWS + rows, tl.sum(sum_wdy_x_hat, axis=1) / WIDTH, mask=row_inside)


def norm_backward(
    dy: Tensor,
    dresidual_out: Tensor | None,
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rowscale: Tensor | None,
    dropout_seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dims: int,
    centered: bool,
    zero_centered: bool,
    from_output: bool,
    dropout_p: float,
    dsum_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    *,
    config: NormBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_forward`'s y and h.

    Args:
        dy: (..., *normalized_shape), any strides; rows at unequal distances are copied.
        dresidual_out: the gradient that arrives at h, of dy's shape, or None for zeros.
        kept: what was normalized (h, or x where there is no h) or, with `from_output`, y.
        weight, rowscale, dropout_seed, dims, centered, zero_centered, dropout_p: as in the forward.
        bias: as in the forward; read with `from_output` alone.
        mean, rstd: what the forward returned; without `centered`, and with `from_output`, mean is not read.
        dsum_dtype, dx_dtype, dweight_dtype, dbias_dtype: the dtype that gradient is returned in; None: it is not
            computed.
        config: replaces the selected launch configs.

    Returns:
        The gradient of h, which is that of the residual and of an x without dropout and rowscale; that of x; both
        contiguous; dweight and dbias. An empty tensor stands for each gradient not asked for.
    """
    of_rows, of_columns = (dsum_dtype, dx_dtype), (dweight_dtype, dbias_dtype)
    dsum, dx, dweight, dbias = gradients = _empty_gradients(kept, dims, of_rows, of_columns)
    if kept.numel() == 0:
        return dsum, dx, dweight.zero_(), dbias.zero_()
    plan = _plan(
        kept.shape,
        (dy.stride(), kept.stride(), None if dresidual_out is None else dresidual_out.stride()),
        (dy.dtype, kept.dtype) if dresidual_out is None else (dy.dtype, kept.dtype, dresidual_out.dtype),
        dims,
        from_output or dropout_seed is not None,
        config,
        _target.target_of(kept.device),
    )
    walk = plan.walk
    loaded: dict[str, Any] = {
        "dy": Matrix(walk.read(0, dy), walk.distances[0]),
        "kept": Matrix(walk.read(1, kept), walk.distances[1]),
        "weight_ptr": None if weight is None else weight.contiguous(),
        "bias_ptr": bias.contiguous() if bias is not None and from_output else None,
        "mean_ptr": mean.contiguous() if mean is not None and centered and not from_output else None,
        "rstd_ptr": rstd.contiguous(),
        "CENTERED": centered,
        "ZERO_CENTERED": zero_centered,
        "FROM_OUTPUT": from_output,
    }
    parameters = [t for t, dtype in zip(gradients[2:], of_columns, strict=True) if dtype is not None]
    needs_dsum = of_rows != (None, None)
    if not parameters and not needs_dsum:
        return gradients
    partials = rstd.new_empty((len(parameters), *plan.partials)) if parameters else None
    with _target.launching_on(kept):
        launch(
            _norm_backward_kernel,
            walk.grid,
            walk.constants,
            dresidual_out=None
            if dresidual_out is None
            else Matrix(walk.read(2, dresidual_out), walk.distances[2]),
            rowscale_ptr=None if rowscale is None else rowscale.contiguous(),
            dropout=dropout_of(dropout_seed, dropout_p),
            row_means_ptr=_row_means(rstd, loaded, plan) if needs_dsum else None,
            dsum_ptr=None if dsum_dtype is None else dsum,
            dx_ptr=None if dx_dtype is None else dx,
            partials_ptr=partials,
            NEEDS_DWEIGHT=dweight_dtype is not None,
            NEEDS_DBIAS=dbias_dtype is not None,
            **loaded,
        )
        if partials is not None:
            add_up_partials(partials, parameters, *plan.sums)
    return gradients


def _empty_gradients(
    kept: Tensor,
    dims: int,
    of_rows: tuple[torch.dtype | None, ...],
    of_columns: tuple[torch.dtype | None, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of these dtypes before they are made: those like `kept`, then those over its columns."""
    dsum, dx = (kept.new_empty(0) if dtype is None else empty_contiguous(kept, dtype) for dtype in of_rows)
    shape = kept.shape[kept.dim() - dims :]
    dweight, dbias = (kept.new_empty(0 if dtype is None else shape, dtype=dtype) for dtype in of_columns)
    return dsum, dx, dweight, dbias


class _Plan(NamedTuple):
    """The launches of the backward.

    Attributes:
        walk: of the kernel that walks the rows of dy, kept and dresidual_out.
        partials: the sizes of each parameter's partial sums.
        sums: tile and warps of the kernel that adds them up.
        row_means: grid and constants of the kernel that makes the rows' means; None where there is no need of it.
    """

    walk: RowsPlan
    partials: tuple[int, int]
    sums: tuple[int, int, int]
    row_means: tuple[tuple[int], Constants] | None


@planned
def _plan(
    shape: torch.Size,
    strides: tuple[tuple[int, ...] | None, ...],
    dtypes: tuple[torch.dtype, ...],
    dims: int,
    heavy: bool,
    config: NormBackwardConfig | None,
    target: Target,
) -> _Plan:
    rows, width = math.prod(shape[: len(shape) - dims]), math.prod(shape[len(shape) - dims :])
    in_place, distances = rows_read(shape, strides, dims)
    alignment = math.gcd(width, *distances, 16)
    if config is None:
        config = select_norm_backward_config(width, alignment, dtypes, heavy, target)
    walk, sums = config.walk, config.sums
    grid = walk_grid(rows, width, walk.block_m, walk.block_n, config.programs)
    sizes = {"ROWS": rows, "WIDTH": width, "ALIGNMENT": alignment}
    constants = Constants(**sizes, **walk.tile, NUM_STAGES=walk.num_stages, TILES_ON_TWO_AXES=grid[2] > 1)
    row_means = None
    if walk.block_n < width:
        row_means = (ceil_div(rows, config.row_means.block_m),), Constants(**sizes, **config.row_means.tile)
    return _Plan(
        RowsPlan(in_place, distances, grid, constants),
        (grid[0], width),
        (sums.block_m, sums.block_n, sums.num_warps),
        row_means,
    )


def _row_means(rstd: Tensor, loaded: dict[str, Any], plan: _Plan) -> Tensor | None:
    """The means of each row (2, rows) that the backward kernel reads where its tile holds no whole row."""
    if plan.row_means is None:
        return None
    grid, constants = plan.row_means
    row_means = rstd.new_empty((2, constants["ROWS"]))
    launch(_norm_row_means_kernel, grid, constants, row_means_ptr=row_means, **loaded)
    return row_means
