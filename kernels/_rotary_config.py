"""Launch configs of the rotary kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn.kernels._config import power_of_2, tunable, warps_of
from fastattn.kernels._target import Target

# A multiprocessor holds 12 programs at a time (`python -m benchmarks inspect rotary`): so many are two to three waves.
_PROGRAMS_OF_A_MULTIPROCESSOR = 32


@dataclass(frozen=True)
class RotaryConfig:
    """Launch config of the rotary kernel.

    Attributes:
        block_m, block_d, block_rest: positions of a tile, pairs, and features passed on.
        num_warps: of a program.
        programs: as few as there should be, where there are as many heads and positions; see `heads_of_program`.
    """

    block_m: int
    block_d: int
    block_rest: int
    num_warps: int
    programs: int


@tunable(
    lambda pairs, rest, dtype, target: (
        power_of_2(pairs),
        power_of_2(rest) if rest else 0,
        8 * dtype.itemsize,
    )
)
def select_rotary_config(pairs: int, rest: int, dtype: torch.dtype, target: Target) -> RotaryConfig:
    """8 pairs a thread: of 16-bit features two 16-byte loads. Wider heads take more warps, a position a program.

    In place (no rest) every pair must have a thread of its own: one that holds it too would read what is written.
    """
    block_d, block_rest = power_of_2(pairs), power_of_2(rest) if rest else 0
    width = max(block_d, block_rest // 2)
    if target.backend == "interpreter":
        return RotaryConfig(4, block_d, block_rest, 1, programs=4)
    warps = min(16, max(4, width // 256))
    programs = _PROGRAMS_OF_A_MULTIPROCESSOR * target.multiprocessors
    return RotaryConfig(max(1, 1024 // width), block_d, block_rest, warps_of(warps, target), programs)


def heads_of_program(heads: Sequence[int], tiles: int, programs: int) -> int:
    """How many heads one program rotates by the angles it has loaded.

    As many as leave enough programs, and about as many in each.

    Args:
        heads: of each tensor.
        tiles: of positions, in all batches.
        programs: of the config.
    """
    most = max(heads)
    wanted = max(1, sum(heads) * tiles // programs)
    groups = -(-most // wanted)
    return -(-most // groups)
