"""Launch configs of the rotary kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.kernels._config import power_of_2, tunable, warps_of
from fastattn.kernels._target import Target

# A multiprocessor holds 12 programs at a time (`python -m benchmarks inspect rotary`): so many are two to three waves.
_PROGRAMS_OF_A_MULTIPROCESSOR = 32


@dataclass(frozen=True)
class RotaryConfig:
    """Tile of the rotary kernel: block_m positions of block_d pairs and block_rest features passed on; its warps."""

    block_m: int
    block_d: int
    block_rest: int
    num_warps: int


@tunable(lambda pairs, rest, target: (power_of_2(pairs), power_of_2(rest) if rest else 0))
def select_rotary_config(pairs: int, rest: int, target: Target) -> RotaryConfig:
    """8 pairs a thread: of 16-bit features two 16-byte loads. Wider heads take more warps, a position a program.

    In place (no rest) every pair must have a thread of its own: one that holds it too would read what is written.
    """
    block_d, block_rest = power_of_2(pairs), power_of_2(rest) if rest else 0
    width = max(block_d, block_rest // 2)
    if target.backend == "interpreter":
        return RotaryConfig(4, block_d, block_rest, 1)
    warps = min(16, max(4, width // 256))
    return RotaryConfig(max(1, 1024 // width), block_d, block_rest, warps_of(warps, target))


def heads_of_program(heads: Sequence[int], tiles: int, target: Target) -> int:
    """How many heads one program rotates by the angles it has loaded.

    As many as leave enough programs, and about as many in each.

    Args:
        heads: of each tensor.
        tiles: of positions, in all batches.
    """
    if target.backend == "interpreter":
        return 2
    most = max(heads)
    wanted = max(1, sum(heads) * tiles // (_PROGRAMS_OF_A_MULTIPROCESSOR * target.multiprocessors))
    groups = -(-most // wanted)
    return -(-most // groups)
