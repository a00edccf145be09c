"""Adds up float32 partial sums in their order, so that a gradient has the same bits on every run."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastattn.kernels._config import warps_of
from fastattn.kernels._target import Target
from fastattn.kernels.norm_backward import _sum_partials_kernel


def sum_partials(partials: Tensor, dtype: torch.dtype, target: Target) -> Tensor:
    """The sums (width,) over the rows of `partials` (count, width), in a dtype."""
    count, width = partials.shape
    out = partials.new_empty(width, dtype=dtype)
    block_m, block_n = (4, 64) if target.backend == "interpreter" else (64, 32)
    _sum_partials_kernel[(triton.cdiv(width, block_n), 1)](
        partials_ptr=partials,
        first_ptr=out,
        second_ptr=out,
        COUNT=count,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps_of(4, target),
    )
    return out
