"""What the functions that choose launch configs share. Configs are frozen data, chosen from shape, dtype and target."""

from __future__ import annotations

import torch

from fastattn.kernels._target import Target

# Of axes 1 and 2 of a grid; axis 0 ends at 2^31 - 1.
MOST_OF_AXIS = 65_535


def loads_are_wide(alignment: int, dtype: torch.dtype) -> bool:
    """Whether a thread can load 8 bytes or more at a time."""
    return alignment * dtype.itemsize >= 8


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size. `triton.cdiv` costs a launch microseconds, more than an allocation."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below size."""
    return 1 << (size - 1).bit_length()


def warps_of(count: int, target: Target) -> int:
    """Warps of 32 threads, as this target's number of warps: AMD's hold 64."""
    return count // 2 if target.backend == "hip" else count


def walk_grid(rows: int, width: int, block_m: int, block_n: int, programs: int) -> tuple[int, int, int]:
    """The grid of a kernel of which about `programs` walk the rows: programs of each column tile, and column tiles.

    A row of 2^24 columns has more tiles than the 65,535 of an axis: they take two, the last of them with tiles beyond
    the row. See `_column_tile`. Axis 0 holds the programs, since the registers of the kernels were seen to depend on
    that: with the tiles there, the norms' backward took 145 instead of 128 in 768 columns, or 1 program instead of 2.
    """
    tiles = ceil_div(width, block_n)
    of_axis_2 = ceil_div(tiles, MOST_OF_AXIS)
    return min(ceil_div(programs, tiles), ceil_div(rows, block_m)), ceil_div(tiles, of_axis_2), of_axis_2
