"""Small maths shared by kernels: no loads, no stores, no program ids."""

import triton
import triton.language as tl

# tl.constexpr, because a jit function may read no other globals.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# In the interpreter a constexpr times a tensor is a constexpr: constants stand to the right of tensors.


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _tanh(x, FORM: tl.constexpr):
    """tanh of a float32 tile.

    "exact": to an ulp or two. "ratio": an error of 1e-7. "instruction": NVIDIA's, from compute capability 7.5 on, with
    a relative error of 2^-11 at one special function, half of the ratio's; flash-attn's kernels use it too.
    """
    if FORM == "instruction":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FORM == "ratio":
        # An overflow of exp2 gives 1.
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    else:
        return _exact_tanh(x)


@triton.jit
def _exact_tanh(x):
    """tanh to an ulp or two; (1 - e) / (1 + e), e = exp(-2 |x|), would cancel near 0."""
    square = x * x
    # The series to x^11: the next term is below 1e-8 of the sum where |x| < 0.3.
    series = square * (-1382.0 / 155925.0) + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _online_softmax_step(scores, row_max, row_sum, SHIFT: tl.constexpr = 0):
    """One tile of the softmax over a row that is seen tile by tile (Milakov and Gimelshein, 2018, algorithm 3).

    scores: (BLOCK_M, BLOCK_N) in base 2, -inf where masked. row_max, row_sum: (BLOCK_M,), of the tiles before.
    Returns the tile's weights relative to the new maximum, the factor for what was summed relative to the old
    one, and the new maximum and sum. Weights, and with them the sum, are 2^SHIFT times as large.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no key yet has maximum -inf: a finite pivot makes its weights 0 and not NaN.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - (pivot if SHIFT == 0 else pivot - SHIFT)[:, None])
    rescale = tl.exp2(row_max - pivot)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)
