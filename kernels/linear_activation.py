"""A matrix product with an activation in its epilogue: the MLP's first layer forward, its second layer backward.

Forward, act = activation(x W^T + b), with the argument of the activation written beside it where the backward wants it.
Backward, dpre = (dy W) * activation'(pre), with dpre's sums over the rows, which are the gradient of b, and the
activation of pre again where the forward has not kept it. One kernel: the product is the same, the epilogue differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._activation import _activate, _through_activation
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._linear_config import LinearConfig, select_linear_config
from fastattn.kernels._partials import sum_partials
from fastattn.kernels._plan import Constants, planned
from fastattn.kernels._target import Target

# Within a tile of at most 256 rows, offsets are 32-bit integers.
_MAX_STRIDE = (1 << 31) // 256


@triton.jit
def _grouped_tile(program, TILES_M, TILES_N, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a program, GROUP_M row tiles at a time.

    Programs that run together then read few tiles of either matrix, which stay in the L2 cache.
    """
    first = program // (GROUP_M * TILES_N) * GROUP_M
    group = tl.minimum(TILES_M - first, GROUP_M)
    within = program % (GROUP_M * TILES_N)
    return first + within % group, within // group


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    first_m,
    first_n,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ROWS,
    COLUMNS,
    DEPTH,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of A B in float32, with A (ROWS, DEPTH) and B (DEPTH, COLUMNS); zeros outside."""
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # A tile's origin is found with 64-bit arithmetic, the elements within with 32-bit.
    a_ptr += tl.cast(first_m, tl.int64) * stride_am
    b_ptr += tl.cast(first_n, tl.int64) * stride_bn
    a_pointers = a_ptr + (rows[:, None] * stride_am + depth[None, :] * stride_ak)  # (BLOCK_M, BLOCK_K)
    b_pointers = b_ptr + (depth[:, None] * stride_bk + columns[None, :] * stride_bn)  # (BLOCK_K, BLOCK_N)
    a_inside = (first_m + rows < ROWS)[:, None]  # the last row tile overruns
    b_inside = (first_n + columns < COLUMNS)[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers, mask=a_inside, other=0.0)
        else:
            a = tl.load(a_pointers, mask=a_inside & (start + depth < DEPTH)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(b_pointers)
        elif EVEN_K:
            b = tl.load(b_pointers, mask=b_inside, other=0.0)
        else:
            b = tl.load(b_pointers, mask=b_inside & (start + depth < DEPTH)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        a_pointers += BLOCK_K * tl.cast(stride_ak, tl.int64)
        b_pointers += BLOCK_K * tl.cast(stride_bk, tl.int64)
    return product


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _epilogue(
    product, pointers, first_m, first_n, ROWS, COLUMNS, dtype: tl.constexpr, ACTIVATION: tl.constexpr
):
    """What becomes of a piece of A B, of the rows from first_m and the columns from first_n on.

    pointers: bias, then pre, act, dpre, at the tile's first row, and the tile's row of partials; see the kernel.
    """
    bias_ptr, pre_ptr, act_ptr, dpre_ptr, partials_ptr = pointers
    rows, columns = tl.arange(0, product.shape[0]), first_n + tl.arange(0, product.shape[1])
    column_inside = columns < COLUMNS  # the last tiles overrun
    inside = (first_m + rows < ROWS)[:, None] & column_inside[None, :]
    offsets = rows[:, None] * COLUMNS + columns[None, :]  # 32-bit within a tile
    if dpre_ptr is None:
        if bias_ptr is not None:
            product += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        # Rounded before the activation, as PyTorch's linear layer rounds: a backward that finds the activation from
        # the pre that was kept then finds the same bits.
        pre = product.to(dtype)
        if pre_ptr is not None:
            tl.store(pre_ptr + offsets, pre, mask=inside)
        if act_ptr is not None:
            act = _activate(pre.to(tl.float32), ACTIVATION, dtype)
            tl.store(act_ptr + offsets, act.to(dtype), mask=inside)
    else:
        pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        # Zero outside: rows of zeros made the product, and pre is 0 there.
        dpre = _through_activation(product, pre, ACTIVATION, dtype)
        tl.store(dpre_ptr + offsets, dpre.to(dtype), mask=inside)
        if partials_ptr is not None:
            tl.store(partials_ptr + columns, tl.sum(dpre, axis=0), mask=column_inside)
        if act_ptr is not None:
            tl.store(act_ptr + offsets, _activate(pre, ACTIVATION, dtype).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["ROWS"])
def _linear_activation_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    pre_ptr,
    act_ptr,
    dpre_ptr,
    partials_ptr,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ROWS,
    COLUMNS,
    DEPTH,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes a tile of A B and what its epilogue makes of it; grid (row tiles * column tiles,).

    Forward, where dpre_ptr is None: pre = A B + bias to pre_ptr and its activation to act_ptr, each where given.
    Backward: dpre = A B * activation'(pre) of the pre that is read, the activation of pre to act_ptr and the tile's
    column sums of dpre to its row of partials_ptr, (row tiles, COLUMNS) in float32, each where given.
    pre, act and dpre are contiguous (ROWS, COLUMNS); A and B have any strides.
    """
    tile_m, tile_n = _grouped_tile(
        tl.program_id(0), tl.cdiv(ROWS, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP_M
    )
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    product = _product(
        a_ptr, b_ptr, first_m, first_n, stride_am, stride_ak, stride_bk, stride_bn,
        ROWS, COLUMNS, DEPTH, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    first_element = tl.cast(first_m, tl.int64) * COLUMNS
    if pre_ptr is not None:
        pre_ptr += first_element
    if act_ptr is not None:
        act_ptr += first_element
    if dpre_ptr is not None:
        dpre_ptr += first_element
    if partials_ptr is not None:
        partials_ptr += tl.cast(tile_m, tl.int64) * COLUMNS
    pointers = (bias_ptr, pre_ptr, act_ptr, dpre_ptr, partials_ptr)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    # In pieces of a few columns, whose activations, gradients and offsets do not all need registers at once.
    piece: tl.constexpr = BLOCK_N // PIECES
    if PIECES == 1:
        _epilogue(product, pointers, first_m, first_n, ROWS, COLUMNS, dtype, ACTIVATION)
    else:
        left, right = _halves(product)
        if PIECES == 2:
            _epilogue(left, pointers, first_m, first_n, ROWS, COLUMNS, dtype, ACTIVATION)
            _epilogue(right, pointers, first_m, first_n + piece, ROWS, COLUMNS, dtype, ACTIVATION)
        else:
            first, second = _halves(left)
            third, fourth = _halves(right)
            _epilogue(first, pointers, first_m, first_n, ROWS, COLUMNS, dtype, ACTIVATION)
            _epilogue(second, pointers, first_m, first_n + piece, ROWS, COLUMNS, dtype, ACTIVATION)
            _epilogue(third, pointers, first_m, first_n + 2 * piece, ROWS, COLUMNS, dtype, ACTIVATION)
            _epilogue(fourth, pointers, first_m, first_n + 3 * piece, ROWS, COLUMNS, dtype, ACTIVATION)


def linear_activation_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    need_pre: bool,
    need_act: bool,
    *,
    config: LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """pre = x weight^T + bias and its activation.

    Args:
        x: (rows, width); read in place where one of its strides is 1, else copied.
        weight: (hidden, width), likewise, of x's dtype.
        bias: (hidden,) or None.
        activation: a name of `fastattn.kernels._activation`.
        need_pre, need_act: what is written.
        config: replaces the selected launch config.

    Returns:
        pre and act, (rows, hidden) in x's dtype, contiguous; an empty tensor for one that is not asked for.
    """
    shape = (x.size(0), weight.size(0))
    pre, act = x.new_empty(shape if need_pre else 0), x.new_empty(shape if need_act else 0)
    if (need_pre or need_act) and 0 not in shape:
        _launch(
            x,
            weight.t(),
            activation,
            config,
            bias_ptr=None if bias is None else bias.contiguous(),
            pre_ptr=pre if need_pre else None,
            act_ptr=act if need_act else None,
            dpre_ptr=None,
            partials_ptr=None,
        )
    return pre, act


def linear_activation_backward(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    dbias_dtype: torch.dtype | None,
    need_act: bool,
    *,
    config: LinearConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre = (dy weight) * activation'(pre), its sums over the rows, and the activation of pre again.

    Args:
        dy: (rows, out); read in place where one of its strides is 1, else copied.
        weight: (out, hidden), likewise.
        pre: (rows, hidden), contiguous, as the forward wrote it.
        activation: as in the forward.
        dbias_dtype: the dtype of the sums; None: they are not computed.
        need_act: whether the activation is written.
        config: replaces the selected launch config.

    Returns:
        dpre (rows, hidden), the sums (hidden,) and act (rows, hidden); an empty tensor for what is not asked for.
    """
    dpre = torch.empty_like(pre)
    act = torch.empty_like(pre) if need_act else pre.new_empty(0)
    hidden = pre.size(1)
    if pre.numel() == 0:
        return dpre, pre.new_zeros(0 if dbias_dtype is None else hidden, dtype=dbias_dtype), act
    target = _target.target_of(pre.device)
    partials = None
    if dbias_dtype is not None:
        config = config or select_linear_config(pre.dtype, target)
        row_tiles = ceil_div(pre.size(0), config.block_m)
        partials = pre.new_empty((row_tiles, hidden), dtype=torch.float32)
    _launch(
        dy,
        weight,
        activation,
        config,
        bias_ptr=None,
        pre_ptr=pre.contiguous(),
        act_ptr=act if need_act else None,
        dpre_ptr=dpre,
        partials_ptr=partials,
    )
    if partials is None or dbias_dtype is None:
        return dpre, pre.new_empty(0), act
    with _target.launching_on(pre):
        return dpre, sum_partials(partials, dbias_dtype, target), act


def _launch(a: Tensor, b: Tensor, activation: str, config: LinearConfig | None, **epilogue: Any) -> None:
    """The product of a (rows, depth) and b (depth, columns), with elements, into what the epilogue is given."""
    plan = _plan(a.shape, a.stride(), b.shape, b.stride(), a.dtype, config, _target.target_of(a.device))
    with _target.launching_on(a):
        launch(
            _linear_activation_kernel,
            plan.grid,
            plan.constants,
            a_ptr=a if plan.reads_a else a.contiguous(),
            b_ptr=b if plan.reads_b else b.contiguous(),
            **epilogue,
            ACTIVATION=activation,
        )


class _Plan(NamedTuple):
    """The launch, and which of the two matrices it reads where they lie."""

    reads_a: bool
    reads_b: bool
    grid: tuple[int]
    constants: Constants


@planned
def _plan(
    shape_a: tuple[int, ...],
    strides_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    strides_b: tuple[int, ...],
    dtype: torch.dtype,
    config: LinearConfig | None,
    target: Target,
) -> _Plan:
    (rows, depth), columns = shape_a, shape_b[1]
    config = config or select_linear_config(dtype, target)
    reads_a, reads_b = _readable(strides_a), _readable(strides_b)
    stride_am, stride_ak = strides_a if reads_a else (depth, 1)
    stride_bk, stride_bn = strides_b if reads_b else (columns, 1)
    constants = Constants(
        stride_am=stride_am,
        stride_ak=stride_ak,
        stride_bk=stride_bk,
        stride_bn=stride_bn,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        EVEN_N=columns % config.block_n == 0,
        EVEN_K=depth % config.block_k == 0,
        PIECES=config.pieces,
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    grid = (ceil_div(rows, config.block_m) * ceil_div(columns, config.block_n),)
    return _Plan(reads_a, reads_b, grid, constants)


def _readable(strides: tuple[int, ...]) -> bool:
    """Whether one of a matrix's strides is 1 and the other fits a tile's offsets."""
    return 1 in strides and max(strides) <= _MAX_STRIDE
