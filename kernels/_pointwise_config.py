"""Launch configs of the activation kernels, and what their activations are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn.kernels._config import ceil_div, loads_are_wide, power_of_2, tunable, walk_grid, warps_of
from fastattn.kernels._plan import Constants, RowsPlan, planned, rows_read
from fastattn.kernels._target import Target

# What the forms of GELU are called among the activations of `fastattn.kernels._activation`.
GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}


@dataclass(frozen=True)
class GeluConfig:
    """Launch config of both GELU kernels: elements a program computes, and its warps."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class TileConfig:
    """Launch config of an activation kernel over rows: its tile of rows and columns, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class WalkConfig:
    """Launch config of a kernel whose programs each walk a share of the rows, in one tile of columns.

    Attributes:
        block_m, block_n, num_warps: as in `TileConfig`.
        num_stages: tiles in flight.
        programs: how many there are, of all column tiles together; it does not depend on the number of rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


# In the keys, wider rows are one: they are walked in tiles of columns.
_MOST_COLUMNS = 1024


@tunable(lambda dtype, tensors, target: (8 * dtype.itemsize, tensors))
def select_gelu_config(dtype: torch.dtype, tensors: int, target: Target) -> GeluConfig:
    """16 elements a thread in 16-bit types, 8 in float32: two 16-byte loads of each tensor that is read.

    `tensors` is how many are: 1 forward, 2 backward. Compiled and read, not measured: with one load a thread, all the
    threads that fit on an H200's multiprocessor wait for 1.1 times what its bandwidth needs, with two for 1.7 to 2.3.
    """
    block = 1024 if target.backend == "interpreter" or dtype.itemsize > 2 else 2048
    return GeluConfig(block, num_warps=2 if target.backend == "hip" else 4)


@tunable(
    lambda width, alignment, dtype, tensors, target: (
        min(power_of_2(width), _MOST_COLUMNS),
        loads_are_wide(alignment, dtype),
        8 * dtype.itemsize,
        tensors,
    )
)
def select_tile_config(
    width: int, alignment: int, dtype: torch.dtype, tensors: int, target: Target
) -> TileConfig:
    """As many elements a thread as for GELU, in rows of at most 256 columns; 8 of three tensors and in narrow loads.

    A warp then reads 256 elements of a row at once, and a width that is no power of 2 wastes at most 255 lanes a row.

    `alignment` is what is known to divide the width and the row strides, in elements; `tensors` how many are read.
    """
    if target.backend == "interpreter":
        return TileConfig(block_m=8, block_n=min(power_of_2(width), 64), num_warps=1)
    few = tensors <= 2 and dtype.itemsize == 2 and loads_are_wide(alignment, dtype)
    block_n = min(power_of_2(width), 256)
    return TileConfig((2048 if few else 1024) // block_n, block_n, warps_of(4, target))


@planned
def tile_plan(
    shape: Sequence[int],
    strides: tuple[Sequence[int] | None, ...],
    dtype: torch.dtype,
    tensors: int,
    config: TileConfig | None,
    target: Target,
) -> RowsPlan:
    """The launch of a kernel whose programs each take a tile of tensors (..., width) of one shape.

    The first `tensors` of those that strides are given of are read.
    """
    width = shape[-1]
    rows = math.prod(shape[:-1])
    in_place, distances = rows_read(shape, strides, 1)
    alignment = math.gcd(width, *distances, 16)
    config = config or select_tile_config(width, alignment, dtype, tensors, target)
    constants = Constants(
        ROWS=rows,
        WIDTH=width,
        ALIGNMENT=alignment,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    programs = ceil_div(rows, config.block_m) * ceil_div(width, config.block_n)
    return RowsPlan(in_place, distances, (programs,), constants)


@tunable(
    lambda width, alignment, dtype, target: (
        min(power_of_2(width), _MOST_COLUMNS),
        loads_are_wide(alignment, dtype),
        8 * dtype.itemsize,
    )
)
def select_walk_config(width: int, alignment: int, dtype: torch.dtype, target: Target) -> WalkConfig:
    """Tiles of 16 elements a thread, whose sums stay in registers; 8 programs of 4 warps a multiprocessor.

    `alignment` is what is known to divide the width and the row strides, in elements. Narrow loads take a register for
    each address, so that 8 elements a thread are enough.

    Compiled and read, not measured.
    """
    if target.backend == "interpreter":
        return WalkConfig(4, min(power_of_2(width), 32), num_warps=1, num_stages=1, programs=6)
    # The next rows' loads are in flight while one is computed, where there are asynchronous copies.
    num_stages = 1
    if target.backend == "cuda" and int(target.arch) >= 80:
        num_stages = 3 if target.shared_memory > 160_000 else 2
    elements = 2048 if loads_are_wide(alignment, dtype) else 1024
    block_n = min(power_of_2(width), 256)
    return WalkConfig(
        elements // block_n, block_n, warps_of(4, target), num_stages, programs=8 * target.multiprocessors
    )


@planned
def walk_plan(
    shape: Sequence[int],
    strides: tuple[Sequence[int] | None, ...],
    dtype: torch.dtype,
    config: WalkConfig | None,
    target: Target,
) -> RowsPlan:
    """The launch of a kernel whose programs walk the rows of tensors (..., width) of one shape."""
    width = shape[-1]
    rows = math.prod(shape[:-1])
    in_place, distances = rows_read(shape, strides, 1)
    alignment = math.gcd(width, *distances, 16)
    config = config or select_walk_config(width, alignment, dtype, target)
    grid = walk_grid(rows, width, config.block_m, config.block_n, config.programs)
    constants = Constants(
        ROWS=rows,
        WIDTH=width,
        ALIGNMENT=alignment,
        TILES_ON_TWO_AXES=grid[2] > 1,
        NUM_STAGES=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return RowsPlan(in_place, distances, grid, constants)
