"""Launch config of the kernel that adds up partial sums, where it is not part of a norm's."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.kernels._config import power_of_2, tunable, warps_of
from fastattn.kernels._target import Target

# In the keys, wider rows are one: all have more column tiles than a GPU has multiprocessors.
_MOST_COLUMNS = 8192


@dataclass(frozen=True)
class PartialSumsConfig:
    """Tile of partial sums by columns, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


@tunable(lambda width, target: (min(power_of_2(width), _MOST_COLUMNS),))
def select_partial_sums_config(width: int, target: Target) -> PartialSumsConfig:
    """Few columns a program, since there are few columns; 128 rows at a time, which is all of them in most calls.

    Compiled and read, not measured: what takes the time is to wait for memory once, or twice.
    """
    if target.backend == "interpreter":
        return PartialSumsConfig(4, 64, 1)
    return PartialSumsConfig(128, 16, warps_of(4, target))
