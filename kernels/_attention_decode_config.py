"""Launch configs of attention where queries are few, see `_attention_grid`: compiled and read, none measured yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastattn.kernels._attention_config import attention_family, bits_of
from fastattn.kernels._attention_tables import ATTENTION_WIDEST, AttentionTiles
from fastattn.kernels._config import tunable
from fastattn.kernels._target import Target


@dataclass(frozen=True)
class CombineTiles:
    """A tile of `block_s` splits of a row, all of its width."""

    block_s: int
    num_warps: int


@dataclass(frozen=True)
class DecodeConfig:
    """Launch configs of the forward of few queries; see `fastattn.kernels._attention_grid`.

    Attributes:
        tiles: of the forward.
        programs: how many of them run on the device at a time.
        least_keys: of a split, beside which its accumulator, written and read in float32, is to be little traffic.
        combine: of the kernel that puts the splits together.
    """

    tiles: AttentionTiles
    programs: int
    least_keys: int = 256
    combine: CombineTiles = CombineTiles(16, 4)


# By family, bits, padded head dimension and rows, the tile (in one loop, as products do not bind) and how
# many programs a multiprocessor runs at a time. Compiled with every option and read: no spills, loads of 16 bytes; none
# measured. What they have in flight is in kernels/README.md. Rows that have no tiles of their own take those of fewer:
# more tiles then, which read the same keys, all but the first from L2.
_DECODE: dict[tuple[str, int, int, int], tuple[int, int, int, int, int]] = {
    # HGMMA takes 64 rows or more.
    ("hopper", 16, 64, 16): (64, 64, 4, 4, 2),
    ("hopper", 16, 64, 128): (128, 64, 8, 4, 1),
    ("hopper", 16, 128, 16): (64, 32, 4, 4, 2),
    ("hopper", 16, 128, 128): (128, 32, 8, 4, 1),
    # 8 warps, whose two groups compute the same scores: of 4, 94 spill loads.
    ("hopper", 16, 256, 16): (64, 32, 8, 3, 1),
    ("ampere", 16, 64, 16): (16, 64, 4, 3, 2),
    ("ampere", 16, 64, 64): (64, 32, 4, 3, 2),
    ("ampere", 16, 128, 16): (16, 32, 4, 3, 2),
    ("ampere", 16, 128, 64): (32, 32, 4, 3, 2),
    ("ampere", 16, 256, 16): (16, 32, 4, 3, 1),
    ("small", 16, 64, 16): (16, 64, 1, 2, 4),
    ("small", 16, 64, 64): (64, 64, 2, 2, 2),
    ("small", 16, 128, 16): (16, 32, 1, 2, 4),
    ("small", 16, 128, 64): (64, 32, 2, 2, 2),
    ("small", 16, 256, 16): (16, 32, 2, 2, 2),
}
for _family, _stages in (("hopper", 2), ("ampere", 2), ("small", 1)):
    _DECODE[_family, 32, 64, 16] = (16, 32, 4, _stages, 3)
    _DECODE[_family, 32, 128, 16] = (16, 16, 4, _stages, 3)
    _DECODE[_family, 32, 256, 16] = (16, 16, 8, 1, 1)
for _family in ("hopper", "ampere"):
    _DECODE[_family, 16, 512, 16] = (16, 16, 8, 2, 1)
# Rows whose length 16 does not divide are loaded in narrow pieces, whose addresses take the registers of the others:
# with those tiles 26 to 346 spill loads on sm_90 and 33 or 40 on sm_80, none with these, at any number of rows.
_DECODE_NARROW = {
    ("hopper", 64): (64, 64, 8, 3, 1),
    ("hopper", 128): (64, 32, 8, 3, 1),
    ("hopper", 256): (16, 32, 8, 3, 1),
    ("ampere", 64): (16, 64, 4, 3, 2),
    ("ampere", 128): (16, 32, 4, 3, 2),
    ("ampere", 256): (16, 32, 8, 3, 1),
}
# e4m3 has the tiles of 16 bits, none of which has fewer keys than the 32 of an 8-bit product's depth; but with those of
# 128 on sm_90, 14 spill loads with every option and 8 with none.
_DECODE_E4M3 = {("hopper", 128): (64, 64, 8, 3, 1)}
_INTERPRETED_DECODE = DecodeConfig(
    AttentionTiles(16, 16, 1, 1, one_loop=True), programs=8, least_keys=32, combine=CombineTiles(2, 1)
)
_INTERPRETED_E4M3 = replace(_INTERPRETED_DECODE, tiles=AttentionTiles(16, 32, 1, 1, one_loop=True))
_ROWS = (16, 64, 128)


def _row_class(rows: int) -> int:
    return next((most for most in _ROWS if rows <= most), _ROWS[-1])


@tunable(
    lambda rows, head_dim, dtype, target: (
        bits_of(dtype),
        64 if head_dim <= 64 else 128 if head_dim <= 128 else 256 if head_dim <= 256 else 512,
        _row_class(rows),
        head_dim % 16 == 0,
    )
)
def select_decode_config(rows: int, head_dim: int, dtype: torch.dtype, target: Target) -> DecodeConfig:
    """The tiles where few rows of queries see many keys.

    Args:
        rows: that see the same keys: queries, times the heads of a group where these share a tile.
        head_dim: up to 512, the wider of q's and v's.
    """
    if target.backend == "interpreter":
        return _INTERPRETED_E4M3 if bits_of(dtype) == 8 else _INTERPRETED_DECODE
    family, bits = attention_family(target), max(16, bits_of(dtype))
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256 if head_dim <= 256 else 512
    if width == 512 and (family, bits, width, 16) not in _DECODE:
        return DecodeConfig(ATTENTION_WIDEST[family, bits], target.multiprocessors)
    of_rows = _row_class(rows)
    while (family, bits, width, of_rows) not in _DECODE:
        of_rows //= 2
    found = _DECODE[family, bits, width, of_rows]
    if bits_of(dtype) == 8:
        found = _DECODE_E4M3.get((family, width), found)
    elif head_dim % 16 and bits == 16:
        found = _DECODE_NARROW.get((family, width), found)
    block_m, block_n, num_warps, num_stages, programs = found
    tiles = AttentionTiles(block_m, block_n, num_warps, num_stages, one_loop=True)
    return DecodeConfig(tiles, programs * target.multiprocessors)
