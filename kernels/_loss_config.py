"""Launch configs of the cross-entropy kernels, and the pure functions that choose them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastattn.kernels._config import loads_are_wide, power_of_2, tunable, warps_of
from fastattn.kernels._plan import Constants, planned
from fastattn.kernels._target import Target


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Launch config of one cross-entropy kernel: its tile of rows and classes, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


class RowStrides(NamedTuple):
    """Where row i of a tensor lies: at `i // inner * outer_stride + i % inner * inner_stride`.

    `inner` is None where all rows are `inner_stride` apart.
    """

    outer_stride: int
    inner_stride: int
    inner: int | None


# In the keys, more classes are one: rows are walked in tiles.
_MOST_CLASSES = 32_768


def _key(classes: int, alignment: int, dtype: torch.dtype, target: Target) -> tuple[int, bool, int]:
    return min(power_of_2(classes), _MOST_CLASSES), loads_are_wide(alignment, dtype), 8 * dtype.itemsize


@tunable(_key)
def select_cross_entropy_forward_config(
    classes: int, alignment: int, dtype: torch.dtype, target: Target
) -> CrossEntropyConfig:
    """A program walks its rows in tiles of up to 8,192 classes, once or twice.

    `alignment` is what is known to divide the number of classes and the row strides, in elements.

    Compiled and read, not measured: 32 elements a thread are four 16-byte loads of a 16-bit type in flight, and two
    programs of 8 warps on a multiprocessor then have 32 KiB on their way, about what hides an H200's latency. Narrow
    loads, of a vocabulary such as 50,257, take tiles of 2,048: with 4,096 and 8 warps the gradient spilled. 1,024
    classes are a warp's, whose sums then need no shared memory; several rows of fewer took up to 255 registers so.
    """
    if loads_are_wide(alignment, dtype):
        return _config(classes, 32, 1 if power_of_2(classes) == 1024 else 4, 8, target)
    return _config(classes, 16, 4, 4, target)


@tunable(_key)
def select_cross_entropy_backward_config(
    classes: int, alignment: int, dtype: torch.dtype, target: Target
) -> CrossEntropyConfig:
    """A program computes one tile; with the statistics known, tiles of a row depend on nothing else."""
    per_thread = 16 if loads_are_wide(alignment, dtype) else 8
    return _config(classes, per_thread, 4, 4, target)


def _config(
    classes: int, per_thread: int, least_warps: int, most_warps: int, target: Target
) -> CrossEntropyConfig:
    block_n = power_of_2(classes)
    if target.backend == "interpreter":
        return CrossEntropyConfig(block_m=4, block_n=min(block_n, 128), num_warps=1)
    block_n = min(block_n, 32 * most_warps * per_thread)
    warps = min(max(block_n // per_thread // 32, least_warps), most_warps)
    # At most 64 rows of few classes: each takes registers for its statistics.
    block_m = min(max(32 * warps * per_thread // block_n, 1), 64)
    return CrossEntropyConfig(block_m, block_n, warps_of(warps, target))


@planned
def rows_plan(
    shape: Sequence[int],
    strides: Sequence[int],
    config_of: Callable[[int, int, torch.dtype, Target], CrossEntropyConfig],
    dtype: torch.dtype,
    config: CrossEntropyConfig | None,
    target: Target,
) -> tuple[RowStrides, CrossEntropyConfig, Constants]:
    """What a launch on logits (..., classes) takes beside its tensors: strides, config, arguments of both kernels.

    Raises:
        ValueError: the strides are not those of rows.
    """
    rows = row_strides(shape, strides)
    if rows is None:
        raise ValueError(f"logits of shape {tuple(shape)} have strides {strides}, not those of rows")
    alignment = math.gcd(shape[-1], rows.outer_stride, rows.inner_stride, 16)
    config = config or config_of(shape[-1], alignment, dtype, target)
    constants = Constants(
        stride_outer=rows.outer_stride,
        stride_inner=rows.inner_stride,
        INNER=rows.inner,
        ROWS=math.prod(shape[:-1]),
        CLASSES=shape[-1],
        ALIGNMENT=alignment,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return rows, config, constants


def row_strides(shape: Sequence[int], strides: Sequence[int]) -> RowStrides | None:
    """The strides of the rows of a tensor (..., classes), or None where a kernel cannot read them in place.

    The last dimension has to be contiguous, and the others two strides at most: (batch, seq, classes) cut short in
    `seq` has two.
    """
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    if not merged:
        return RowStrides(0, 0, None)
    if len(merged) == 1:
        return RowStrides(0, merged[0][1], None)
    return RowStrides(merged[0][1], merged[1][1], merged[1][0])
