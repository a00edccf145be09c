"""Adds up float32 partial sums in their order, so that a gradient has the same bits on every run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._norm_tiles import _load_tile
from fastattn.kernels._partials_config import select_partial_sums_config
from fastattn.kernels._plan import constants_of
from fastattn.kernels._target import Target


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


def add_up_partials(
    partials: Tensor, sums: Sequence[Tensor], block_m: int, block_n: int, num_warps: int
) -> None:
    """Fills one or two tensors (width,) with the sums over `partials` (1 or 2, count, width), block_m at a time."""
    _, count, width = partials.shape
    target = _target.target_of(partials.device)
    constants = constants_of(
        target, COUNT=count, WIDTH=width, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps
    )
    launch(
        _sum_partials_kernel,
        (ceil_div(width, block_n), len(sums)),
        constants,
        partials_ptr=partials,
        first_ptr=sums[0],
        second_ptr=sums[-1],
    )


def sum_partials(partials: Tensor, dtype: torch.dtype, target: Target) -> Tensor:
    """The sums (width,) over the rows of `partials` (count, width), in a dtype."""
    total = partials.new_empty(partials.size(1), dtype=dtype)
    config = select_partial_sums_config(partials.size(1), target)
    add_up_partials(partials[None], [total], config.block_m, config.block_n, config.num_warps)
    return total
