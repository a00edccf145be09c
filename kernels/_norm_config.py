"""Launch configs of the normalization kernels, and the pure functions that choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn.kernels._config import loads_are_wide, power_of_2, tunable, warps_of
from fastattn.kernels._target import Target


@dataclass(frozen=True)
class NormConfig:
    """Launch config of one normalization kernel: its tile of rows and columns, its warps and pipeline stages.

    Where `block_n` is below the width, a row is walked in column tiles. It is at least 4, of which one draw of random
    numbers serves as many.

    Attributes:
        registers: of a thread, at most, where the compiler is told; it takes more than it needs to where it is not.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    registers: int | None = None

    @property
    def tile(self) -> dict[str, int]:
        """The tile and its warps, as the kernels' launches take them."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps, **limit}


@dataclass(frozen=True)
class NormBackwardConfig:
    """Launch configs of the backward.

    Attributes:
        walk: the kernel that walks all rows with a fixed number of programs.
        row_means: the kernel that makes each row's means where a tile of `walk` holds no whole row.
        sums: the kernel that adds up the programs' partial sums; its tile is partial sums by columns.
        programs: how many programs walk the rows. It does not depend on the number of rows.
    """

    walk: NormConfig
    row_means: NormConfig
    sums: NormConfig
    programs: int


# In the keys all above 16,384 columns are one: no tile holds a whole row there.
_MOST_COLUMNS = 32_768


@tunable(
    lambda width, alignment, dtype, heavy, target: (
        min(_columns_of(width), _MOST_COLUMNS),
        loads_are_wide(alignment, dtype),
        8 * dtype.itemsize,
        heavy,
    )
)
def select_norm_forward_config(
    width: int, alignment: int, dtype: torch.dtype, heavy: bool, target: Target
) -> NormConfig:
    """A tile of whole rows up to 16,384 columns, column tiles above.

    `alignment` is what is known to divide the width and the row strides, in elements; the narrower the loads it
    allows, the more registers their addresses take. `heavy` says that there is dropout, or tensors of two dtypes.

    Compiled and read, not measured: 32 elements a thread are four 16-byte loads of a 16-bit type in flight, and no
    more warps than that takes: one for up to 1,024 columns, whose sums then need no shared memory. For 32,768 columns
    it would take 32 warps, whose 64 registers a thread spill on some targets; and so do 16 and 32 elements of what is
    heavy in the loop over column tiles. From 8,192 columns on the compiler is held to 64 registers, in which these
    tiles of 16 bits fit: one program more fits on a multiprocessor than with the 67 to 91 that it takes by itself.
    """
    block_n = _columns_of(width)
    if target.backend == "interpreter":
        return NormConfig(block_m=4, block_n=min(block_n, 256), num_warps=1)
    per_thread = 32 if loads_are_wide(alignment, dtype) else 16
    if block_n > 512 * per_thread:
        return NormConfig(1, 256 * (8 if heavy else per_thread), warps_of(8, target))
    warps = max(block_n // per_thread // 32, 1)
    limited = target.backend == "cuda" and per_thread == 32 and not heavy
    limited = limited and block_n >= 8192 and dtype.itemsize == 2
    block_m = _rows_of_a_tile(block_n, warps, per_thread)
    return NormConfig(block_m, block_n, warps_of(warps, target), registers=64 if limited else None)


@tunable(
    lambda width, alignment, dtypes, heavy, target: (
        min(_columns_of(width), _MOST_COLUMNS),
        loads_are_wide(alignment, min(dtypes, key=lambda dtype: dtype.itemsize)),
        tuple(8 * dtype.itemsize for dtype in dtypes),
        heavy,
    )
)
def select_norm_backward_config(
    width: int, alignment: int, dtypes: Sequence[torch.dtype], heavy: bool, target: Target
) -> NormBackwardConfig:
    """Everything in one launch up to 8,192 columns; above, the rows' means in one and the rest in column tiles.

    `alignment` is as in the forward; `dtypes` are those of the tensors that are read. `heavy` says that there is
    dropout, or that x_hat is made from y.

    Compiled and read, not measured: with both sums of a column kept in registers, 16 elements a thread need
    about 120 registers, which is two programs of 8 warps or one of 16 a multiprocessor. Random numbers, the parameters
    behind y, and exchanges between layouts of two dtypes take up to 100 more: half as many elements then, and at 8,192
    columns spills, so that one launch serves up to 4,096.
    """
    block_n = _columns_of(width)
    if target.backend == "interpreter":
        tile = NormConfig(block_m=4, block_n=min(block_n, 256), num_warps=1)
        return NormBackwardConfig(tile, tile, sums=NormConfig(4, 64, 1), programs=2)
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
    heavy = heavy or any(dtype.itemsize != narrow.itemsize for dtype in dtypes)
    per_thread = 16 if loads_are_wide(alignment, narrow) and not heavy else 8
    row_means = NormConfig(1, 256 * per_thread, warps_of(8, target))
    if block_n > 512 * per_thread:
        block_m, block_n, warps, programs = 4, 32 * per_thread, 4, 8 * target.multiprocessors
        # Column tiles share the programs: tens of partial sums of each column.
        sums = NormConfig(64, 32, warps_of(4, target))
    else:
        # Three tensors of several rows take 152 registers in 8 warps: one program a multiprocessor.
        warps = max(block_n // per_thread // 32, 4 if len(dtypes) > 2 else 8)
        block_m = _rows_of_a_tile(block_n, warps, per_thread)
        programs = target.multiprocessors * 16 // warps
        # All rows of partial sums at a time where they fit, since what takes the time is to wait for them.
        sums = NormConfig(min(power_of_2(programs), 512), 16, warps_of(8, target))
    stages = _stages(block_m * block_n * sum(dtype.itemsize for dtype in dtypes), warps, target)
    walk = NormConfig(block_m, block_n, warps_of(warps, target), stages)
    return NormBackwardConfig(walk, row_means, sums, programs)


def _stages(tile_bytes: int, warps: int, target: Target) -> int:
    """The next rows' loads are in flight while one is computed, where there are asynchronous copies and room.

    Each stage but one takes the bytes of a tile; 16 warps are to fit on a multiprocessor.
    """
    if target.backend != "cuda" or int(target.arch) < 80:
        return 1
    room = target.shared_memory * warps // 16 - 4096
    return 1 + min(2 if target.shared_memory > 160_000 else 1, room // tile_bytes)


def _columns_of(width: int) -> int:
    return max(power_of_2(width), 4)


def _rows_of_a_tile(block_n: int, warps: int, per_thread: int) -> int:
    """As many rows as make `per_thread` elements for each thread; at most 64, each of which takes registers."""
    return min(max(32 * warps * per_thread // block_n, 1), 64)
