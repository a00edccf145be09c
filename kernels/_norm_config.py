"""Launch configs of the normalization kernels, and the pure functions that choose them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.kernels._config import loads_are_wide, power_of_2, warps_of
from fastattn.kernels._target import Target


@dataclass(frozen=True)
class LayerNormConfig:
    """Launch config of one LayerNorm kernel: its tile of rows and columns, its warps and pipeline stages.

    Where `block_n` is below the width, a row is walked in column tiles.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class LayerNormBackwardConfig:
    """Launch configs of the LayerNorm backward.

    Attributes:
        walk: the kernel that walks all rows with a fixed number of programs, for dweight and dbias, and for
            dx where its tile holds a whole row.
        dx: the kernel that computes dx in column tiles; None where `walk` does.
        sums: the kernel that adds up the programs' partial sums; its tile is partial sums by columns.
        programs: how many programs walk the rows. It does not depend on the number of rows.
    """

    walk: LayerNormConfig
    dx: LayerNormConfig | None
    sums: LayerNormConfig
    programs: int


def select_layer_norm_forward_config(
    width: int, alignment: int, dtype: torch.dtype, target: Target
) -> LayerNormConfig:
    """A tile of whole rows up to 16,384 columns, column tiles above.

    `alignment` is what is known to divide the width and the row strides, in elements; the narrower the loads it
    allows, the more registers their addresses take.

    Compiled and read, not measured: 32 elements a thread are four 16-byte loads of a 16-bit type in flight. For
    32,768 columns it would take 32 warps, whose 64 registers a thread spill on some targets.
    """
    block_n = power_of_2(width)
    if target.backend == "interpreter":
        return LayerNormConfig(block_m=4, block_n=min(block_n, 256), num_warps=1)
    per_thread = 32 if loads_are_wide(alignment, dtype) else 16
    if block_n > 512 * per_thread:
        return LayerNormConfig(1, 256 * per_thread, warps_of(8, target))
    warps = max(block_n // per_thread // 32, 4)
    return LayerNormConfig(_rows_of_a_tile(block_n, warps, per_thread), block_n, warps_of(warps, target))


def select_layer_norm_backward_config(
    width: int, alignment: int, dtype: torch.dtype, target: Target
) -> LayerNormBackwardConfig:
    """Everything in one launch up to 8,192 columns; above, dx in column tiles and the parameters apart.

    `alignment` is as in the forward.

    Compiled and read, not measured: with both sums of a column kept in registers, 16 elements a thread need
    about 120 registers, which is two programs of 8 warps or one of 16 a multiprocessor.
    """
    block_n = power_of_2(width)
    if target.backend == "interpreter":
        tile = LayerNormConfig(block_m=4, block_n=min(block_n, 256), num_warps=1)
        dx = tile if width > tile.block_n else None
        return LayerNormBackwardConfig(tile, dx, sums=LayerNormConfig(4, 64, 1), programs=2)
    # The next rows' loads are in flight while one is computed, where there are asynchronous copies.
    num_stages = 1
    if target.backend == "cuda" and int(target.arch) >= 80:
        num_stages = 3 if target.shared_memory > 160_000 else 2
    per_thread = 16 if loads_are_wide(alignment, dtype) else 8
    sums = LayerNormConfig(64, 32, warps_of(4, target))
    if block_n > 512 * per_thread:
        walk = LayerNormConfig(4, 32 * per_thread, warps_of(4, target), num_stages)
        dx = LayerNormConfig(1, 256 * per_thread, warps_of(8, target))
        return LayerNormBackwardConfig(walk, dx, sums, programs=8 * target.multiprocessors)
    warps = max(block_n // per_thread // 32, 8)
    block_m = _rows_of_a_tile(block_n, warps, per_thread)
    walk = LayerNormConfig(block_m, block_n, warps_of(warps, target), num_stages)
    return LayerNormBackwardConfig(walk, None, sums, programs=target.multiprocessors * 16 // warps)


def _rows_of_a_tile(block_n: int, warps: int, per_thread: int) -> int:
    """As many rows as make `per_thread` elements for each thread; at most 64, each of which takes registers."""
    return min(max(32 * warps * per_thread // block_n, 1), 64)
