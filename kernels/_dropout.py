"""Dropout by Philox (Salmon et al., 2011): what a place draws is made of the place, and never stored."""

import triton
import triton.language as tl

# Salmon et al. (2011), table 2: the fewest rounds of Philox-4x32 without known statistical flaws.
_PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def _random_bits(dropout, first, second, third):
    """Four tiles of 32 random bits for the counter (first, second, third, offset) under the seed."""
    seed = tl.load(dropout.seed_ptr)
    offset = tl.load(dropout.seed_ptr + 1).to(tl.int32)
    return tl.philox(seed, first, second, third, offset, _PHILOX_ROUNDS)


@triton.jit
def _kept_or_zero(values, bits, dropout):
    """Values where their bits keep them, times 1 / (1 - probability); else 0."""
    kept = tl.uint_to_uniform_float(bits) >= dropout.probability
    return tl.where(kept, values * dropout.kept_scale, 0.0)


@triton.jit
def _dropped_rows(tile, dropout, rows, start):
    """A tile (BLOCK_M, BLOCK_N) of a matrix with dropout; rows (BLOCK_M,) are int64, `start` is its first column.

    Its place in the matrix decides whether an element is kept, so that forward and backward agree whatever their
    tiles. A draw serves four columns; `start` and BLOCK_N are multiples of 4. Compiled, the four numbers stay in the
    thread that needs them.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    quads = (start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    low, high = rows.to(tl.int32)[:, None], (rows >> 32).to(tl.int32)[:, None]
    first, second, third, fourth = _random_bits(dropout, quads, low, high)
    bits = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK_M, BLOCK_N)
    return _kept_or_zero(tile, bits, dropout)
