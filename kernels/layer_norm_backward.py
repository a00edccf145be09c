"""LayerNorm backward over rows of any width: dx, dweight and dbias, in one read of x and dy where a row fits.

A fixed number of programs walk the rows. Each sums its share of dweight and dbias in registers, and a second
kernel adds up the programs' sums in their order, so that two runs give the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._norm_config import (
    LayerNormBackwardConfig,
    LayerNormConfig,
    select_layer_norm_backward_config,
)
from fastattn.kernels.layer_norm_forward import (
    _load_parameter,
    _load_tile,
    _multiple_of,
    _store_tile,
    as_rows,
)


@triton.jit
def _dx(wdy, x_hat, sum_wdy, sum_wdy_x_hat, rstd, WIDTH):
    """rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat)) of one tile, with wdy = weight * dy.

    The means are over the whole row: they are the share of the gradient that flows through the row's own mean
    and variance, which follow x.
    """
    mean_wdy, mean_wdy_x_hat = sum_wdy / WIDTH, sum_wdy_x_hat / WIDTH
    return (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["ROWS"])
def _layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    stride_dym,
    stride_xm,
    ROWS,
    WIDTH,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program walks its share of the rows, BLOCK_M at a time; grid (programs, column tiles).

    With NEEDS_DX there is one column tile, which holds whole rows. The program's sums for dweight, then those
    for dbias, go to its rows of partials_ptr, (1 or 2, programs, WIDTH) in float32. dx is contiguous, dy and x
    have unit column strides.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    stride_dym, stride_xm = _multiple_of(stride_dym, ALIGNMENT), _multiple_of(stride_xm, ALIGNMENT)
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = columns < WIDTH  # (BLOCK_N,): the last tile overruns
    if NEEDS_DX and HAS_WEIGHT:
        weight = _load_parameter(weight_ptr, columns, WIDTH, BLOCK_M)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(program * BLOCK_M, ROWS, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES):
        rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
        row_inside = rows < ROWS  # (BLOCK_M,): the last block of rows overruns
        inside = row_inside[:, None] & column_inside[None, :]
        dy = _load_tile(dy_ptr + rows[:, None] * stride_dym, columns, inside)  # (BLOCK_M, BLOCK_N)
        if NEEDS_DBIAS:
            dbias += dy
        if NEEDS_DX or NEEDS_DWEIGHT:
            mean = tl.load(mean_ptr + rows, mask=row_inside, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=row_inside, other=0.0)
            x = _load_tile(x_ptr + rows[:, None] * stride_xm, columns, inside)  # (BLOCK_M, BLOCK_N)
            x_hat = (x - mean[:, None]) * rstd[:, None]
        if NEEDS_DWEIGHT:
            dweight += dy * x_hat
        if NEEDS_DX:
            wdy = dy
            if HAS_WEIGHT:
                wdy *= weight
            # dy is zero outside, and with it both products.
            sum_wdy = tl.sum(wdy, axis=1)
            sum_wdy_x_hat = tl.sum(wdy * x_hat, axis=1)
            dx = _dx(wdy, x_hat, sum_wdy, sum_wdy_x_hat, rstd, WIDTH)
            _store_tile(dx_ptr + rows[:, None] * WIDTH, dx, columns, inside)
    partials_ptr += program * WIDTH
    if NEEDS_DWEIGHT:
        tl.store(partials_ptr + columns, tl.sum(dweight, axis=0), mask=column_inside)
        partials_ptr += tl.num_programs(0).to(tl.int64) * WIDTH
    if NEEDS_DBIAS:
        tl.store(partials_ptr + columns, tl.sum(dbias, axis=0), mask=column_inside)


@triton.jit
def _load_wdy_and_x_hat(
    dy_ptr, x_ptr, weight_ptr, mean, rstd, columns, inside, WIDTH, HAS_WEIGHT: tl.constexpr
):
    """weight * dy and (x - mean) * rstd of one tile; the first is zero outside."""
    wdy = _load_tile(dy_ptr, columns, inside)
    if HAS_WEIGHT:
        wdy *= _load_parameter(weight_ptr, columns, WIDTH, wdy.shape[0])
    return wdy, (_load_tile(x_ptr, columns, inside) - mean[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["ROWS"])
def _layer_norm_dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    stride_dym,
    stride_xm,
    ROWS,
    WIDTH,
    HAS_WEIGHT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes dx of BLOCK_M rows in column tiles, in two passes; grid (cdiv(ROWS, BLOCK_M),).

    dx is contiguous, dy and x have unit column strides.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    stride_dym, stride_xm = _multiple_of(stride_dym, ALIGNMENT), _multiple_of(stride_xm, ALIGNMENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    mean = tl.load(mean_ptr + rows, mask=row_inside, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_inside, other=0.0)
    dy_ptr += rows[:, None] * stride_dym  # (BLOCK_M, 1)
    x_ptr += rows[:, None] * stride_xm
    dx_ptr += rows[:, None] * WIDTH
    # One sum a lane, added up once: no exchange between warps in the loop, and short chains of additions.
    sum_wdy = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_wdy_x_hat = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = row_inside[:, None] & (columns < WIDTH)[None, :]  # the last tile overruns
        wdy, x_hat = _load_wdy_and_x_hat(
            dy_ptr, x_ptr, weight_ptr, mean, rstd, columns, inside, WIDTH, HAS_WEIGHT
        )
        sum_wdy += wdy
        sum_wdy_x_hat += wdy * x_hat
    row_sum_wdy = tl.sum(sum_wdy, axis=1)  # (BLOCK_M,)
    row_sum_wdy_x_hat = tl.sum(sum_wdy_x_hat, axis=1)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = row_inside[:, None] & (columns < WIDTH)[None, :]
        wdy, x_hat = _load_wdy_and_x_hat(
            dy_ptr, x_ptr, weight_ptr, mean, rstd, columns, inside, WIDTH, HAS_WEIGHT
        )
        _store_tile(dx_ptr, _dx(wdy, x_hat, row_sum_wdy, row_sum_wdy_x_hat, rstd, WIDTH), columns, inside)


@triton.jit(do_not_specialize=["COUNT"])
def _sum_partials_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    COUNT,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program adds up COUNT rows of one parameter's partial sums; grid (column tiles, parameters).

    partials_ptr is (parameters, COUNT, WIDTH) in float32. The sums of its first matrix go to first_ptr, those
    of its second to second_ptr, each in that parameter's dtype.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    parameter = tl.program_id(1)
    partials_ptr += parameter.to(tl.int64) * COUNT * WIDTH
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, COUNT, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (rows < COUNT)[:, None] & (columns < WIDTH)[None, :]  # the last rows and columns overrun
        total += _load_tile(partials_ptr + rows[:, None] * WIDTH, columns, inside)
    result = tl.sum(total, axis=0)  # (BLOCK_N,)
    if parameter == 0:
        tl.store(first_ptr + columns, result.to(first_ptr.dtype.element_ty), mask=columns < WIDTH)
    else:
        tl.store(second_ptr + columns, result.to(second_ptr.dtype.element_ty), mask=columns < WIDTH)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    *,
    config: LayerNormBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm_forward`'s y.

    Args:
        dy, x: (..., *normalized_shape), any strides; rows at unequal distances are copied.
        weight: as in the forward.
        mean, rstd: what the forward returned.
        dims: how many trailing dimensions are normalized over.
        need_dx: whether dx is computed.
        dweight_dtype, dbias_dtype: the dtype that gradient is returned in; None: it is not computed.
        config: replaces the selected launch configs.

    Returns:
        dx in x's dtype, contiguous, dweight and dbias; an empty tensor for each gradient not asked for.
    """
    shape = x.shape[x.dim() - dims :]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(0 if dweight_dtype is None else shape, dtype=dweight_dtype)
    dbias = x.new_empty(0 if dbias_dtype is None else shape, dtype=dbias_dtype)
    rows, width = mean.numel(), math.prod(shape)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    x, dy = as_rows(x, rows, width), as_rows(dy, rows, width)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    alignment = math.gcd(width, dy.stride(0), x.stride(0), 16)
    if config is None:
        config = select_layer_norm_backward_config(width, alignment, x.dtype, _target.target_of(x.device))
    with _target.launching_on(x):
        walk_dx = need_dx and config.dx is None
        if need_dx and config.dx is not None:
            _launch_dx(dy, x, weight, mean, rstd, dx, alignment, config.dx)
        if walk_dx or dweight.numel() or dbias.numel():
            _launch_walk(
                dy, x, weight, mean, rstd, dx if walk_dx else None, dweight, dbias, alignment, config
            )
    return dx, dweight, dbias


def _launch_dx(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    alignment: int,
    config: LayerNormConfig,
) -> None:
    rows, width = x.shape
    _layer_norm_dx_kernel[(triton.cdiv(rows, config.block_m),)](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        stride_dym=dy.stride(0),
        stride_xm=x.stride(0),
        ROWS=rows,
        WIDTH=width,
        HAS_WEIGHT=weight is not None,
        ALIGNMENT=alignment,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )


def _launch_walk(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    alignment: int,
    config: LayerNormBackwardConfig,
) -> None:
    """Fills dx, if given, and those of dweight and dbias that are not empty."""
    rows, width = x.shape
    walk, sums = config.walk, config.sums
    column_tiles = triton.cdiv(width, walk.block_n)
    programs = min(triton.cdiv(config.programs, column_tiles), triton.cdiv(rows, walk.block_m))
    parameters = [gradient for gradient in (dweight, dbias) if gradient.numel()]
    partials = x.new_empty((len(parameters), programs, width), dtype=torch.float32)
    _layer_norm_backward_kernel[(programs, column_tiles)](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        partials_ptr=partials,
        stride_dym=dy.stride(0),
        stride_xm=x.stride(0),
        ROWS=rows,
        WIDTH=width,
        HAS_WEIGHT=weight is not None,
        NEEDS_DX=dx is not None,
        NEEDS_DWEIGHT=dweight.numel() > 0,
        NEEDS_DBIAS=dbias.numel() > 0,
        NUM_STAGES=walk.num_stages,
        ALIGNMENT=alignment,
        BLOCK_M=walk.block_m,
        BLOCK_N=walk.block_n,
        num_warps=walk.num_warps,
    )
    if parameters:
        _sum_partials_kernel[(triton.cdiv(width, sums.block_n), len(parameters))](
            partials_ptr=partials,
            first_ptr=parameters[0],
            second_ptr=parameters[-1],
            COUNT=programs,
            WIDTH=width,
            BLOCK_M=sums.block_m,
            BLOCK_N=sums.block_n,
            num_warps=sums.num_warps,
        )
