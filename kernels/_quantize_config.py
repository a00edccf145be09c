"""Launch configs of the kernels that make e4m3 operands: compiled and read, not measured. Imports no Triton.

They stream through memory, and what is to be chosen is few rows; `python -m benchmarks tune` leaves them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.kernels._config import ceil_div
from fastattn.kernels._target import Target

# Elements of a tile in float32: 32 a thread of 4 warps, loaded 16 bytes at a time.
_TILE = 4096
# Fewer rows than this are no program's: reading its statistics would cost more than its rows.
_LEAST_CHUNK = 256


@dataclass(frozen=True)
class QuantizeConfig:
    """Rows of a program's tile and its warps; `keys_warps` are those of 128 keys and values."""

    block_m: int
    num_warps: int
    keys_warps: int


def quantize_tile(block_d: int, target: Target) -> QuantizeConfig:
    """For rows of a padded width up to 256."""
    if target.backend == "interpreter":
        return QuantizeConfig(64, 1, 1)
    return QuantizeConfig(max(16, _TILE // block_d), 4, 8 if block_d <= 128 else 16)


def select_chunks(rows: int, heads: int, block_m: int, target: Target) -> tuple[int, int]:
    """(chunks of a head's rows, rows of a chunk): two programs a multiprocessor where there are rows enough.

    Each of the programs that follow reads the statistics of all chunks of its head, which is why there are no more.
    """
    least = 2 * block_m if target.backend == "interpreter" else _LEAST_CHUNK
    chunks = max(1, min(ceil_div(2 * target.multiprocessors, max(1, heads)), ceil_div(rows, least)))
    chunk = ceil_div(ceil_div(rows, chunks), block_m) * block_m
    return ceil_div(rows, chunk), chunk
