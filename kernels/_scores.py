"""What becomes of a product q . k before the softmax: the one place where a score is modified, forward and backward."""

import triton
import triton.language as tl

from fastattn.kernels._dropout import _kept_or_zero, _random_bits
from fastattn.kernels._math import LOG2_E, _tanh

# -2^127: a power of two, so that the way through the natural logarithm of lse and back to base 2 gives it again.
_LEAST_SCORE = tl.constexpr(-1.7014118346046923e38)


@triton.jit
def _slope_of(slopes, batch, head):
    """A head's ALiBi slope in base 2; 0 without slopes."""
    if slopes is None:
        return 0.0
    else:
        return tl.load(slopes.ptr + batch * slopes.stride_b + head * slopes.stride_h) * LOG2_E


@triton.jit
def _load_plane(plane, batch, head, first_row, first_key, rows, keys, SEQ_Q, OTHER: tl.constexpr):
    """A tile of a (batch, heads, seq_q, seq_k) tensor; rows and keys count within the tile and broadcast.

    It has one row or one column where the plane is broadcast that way: a mask of padding is one load a key. Keys are
    bounded by the plane's size and not by the sequence's, which may hide more of them: what lies between is ignored.
    """
    corner = plane.ptr + batch * plane.stride_b + head * plane.stride_h
    if plane.along == 0:
        return tl.load(corner)
    elif plane.along == 2:
        corner += tl.cast(first_key, tl.int64) * plane.stride_n
        return tl.load(corner + keys * plane.stride_n, mask=first_key + keys < plane.size_n, other=OTHER)
    elif plane.along == 1:
        corner += tl.cast(first_row, tl.int64) * plane.stride_m
        return tl.load(corner + rows * plane.stride_m, mask=first_row + rows < SEQ_Q, other=OTHER)
    else:
        corner += (
            tl.cast(first_row, tl.int64) * plane.stride_m + tl.cast(first_key, tl.int64) * plane.stride_n
        )
        inside = (first_row + rows < SEQ_Q) & (first_key + keys < plane.size_n)
        return tl.load(corner + (rows * plane.stride_m + keys * plane.stride_n), mask=inside, other=OTHER)


@triton.jit
def _scores_of(
    products, score, slope, batch, head, first_row, first_key, rows, keys, SEQ_Q, OFFSET, terms=None
):
    """(scores in base 2, d score / d (scale * product)) of a tile of products, in its own orientation.

    rows and keys count within the tile, shaped to broadcast against the products. The second result is the
    derivative of the soft cap, 1.0 without one. A masked score is -inf; what lies beyond the last row or key is not.
    terms: of `_terms_of_tile`, in the place of the scale.
    """
    if terms is None:
        scores = products * score.scale
    else:
        scores = products * terms[0] + terms[1]
    cap_slope = 1.0
    if score.softcap is not None:
        bent = _tanh(scores, score.tanh)
        cap_slope = 1.0 - bent * bent
        scores = bent * score.softcap
    if score.slopes is not None:
        # slope * |i + offset - j|, from a product a row and a product a key rather than one for each score. Both
        # count from the tile's first key, so that the difference keeps its digits near the diagonal.
        place = (rows + (first_row + OFFSET - first_key)).to(tl.float32) * slope
        scores -= tl.abs(place - keys.to(tl.float32) * slope)
    if score.bias is not None:
        bias = _load_plane(score.bias, batch, head, first_row, first_key, rows, keys, SEQ_Q, 0.0)
        # A bias near the least finite number is not to become -inf, which would hide the key: a row of it is the mean.
        added = bias.to(tl.float32) * LOG2_E
        overflown = (added < _LEAST_SCORE) & (bias > float("-inf"))
        scores += tl.where(overflown, _LEAST_SCORE, added)
    if score.mask is not None:
        mask = _load_plane(score.mask, batch, head, first_row, first_key, rows, keys, SEQ_Q, 0)
        scores = tl.where(mask != 0, scores, float("-inf"))
    return scores, cap_slope


@triton.jit
def _dropped(weights, dropout, batch, head, HEADS, first_row, first_key, rows, keys):
    """Weights, or their gradients, with dropout: 0, or 1 / (1 - probability) times what they were.

    Philox with the place of a score as its counter: (key, row, batch * HEADS + head, offset). Forward and backward draw
    the same whatever their tiles.
    """
    if dropout is None:
        return weights
    else:
        place = (batch * HEADS + head).to(tl.int32)
        bits, _, _, _ = _random_bits(dropout, first_key + keys, first_row + rows, place)
        return _kept_or_zero(weights, bits, dropout)
