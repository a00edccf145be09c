"""The activations and their derivatives on float32 tiles in registers: one constexpr names which.

"gelu" is x * Phi(x). All others but "relu" have the form x * sigmoid(g(x)): "gelu_tanh" and "gelu_quick" (Hendrycks
and Gimpel, 2016, section 2) and "silu" (g(x) = x).
"""

import triton
import triton.language as tl

from fastattn.kernels._math import LOG2_E, _sigmoid

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# sqrt(2 / pi) and the cubic coefficient of the tanh form, and the slope of the quick one.
_TANH_SCALE = tl.constexpr(0.7978845608028654)
_TANH_CUBIC = tl.constexpr(0.044715)
_QUICK_SCALE = tl.constexpr(1.702)


# log2 of 1 - Phi(u) for u >= 0 by powers of u: fitted (Lawson, 1961) to a relative error of Phi(-u) of 3.3e-6 up to 6,
# 5.6e-6 with float32's rounding; beyond, where it is below 1e-9, it goes on falling, and is off by 0.6 % at 8.
_LOG2_TAIL = tl.constexpr(
    (
        -1.8348113144384115e-06,
        6.159828626550734e-05,
        -0.0009305247222073376,
        0.00850789062678814,
        -0.05396006628870964,
        -0.4584643840789795,
        -1.1512510776519775,
        -0.9999952912330627,
    )
)


# In the interpreter a constexpr times a tensor is a constexpr: constants stand to the right of tensors.


@triton.jit
def _normal_cdf(x, DTYPE: tl.constexpr):
    """Phi(x) for results that are rounded to DTYPE.

    In 16 bits one exponential of a polynomial: less than half the instructions of the compilers' erf, whose two
    polynomials choose each coefficient by a move of its own, and no cancellation where x is negative.
    """
    if DTYPE.primitive_bitwidth == 16:
        distance = tl.abs(x)
        exponent = tl.full(x.shape, _LOG2_TAIL[0], tl.float32)
        for power in tl.static_range(1, 8):
            exponent = exponent * distance + _LOG2_TAIL[power]
        tail = tl.exp2(exponent)
        return tl.where(x < 0.0, tail, 1.0 - tail)
    else:
        return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of a float32 tile, which is to be rounded to DTYPE."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # and not tl.maximum, which would drop a NaN
    elif ACTIVATION == "gelu":
        return x * _normal_cdf(x, DTYPE)
    else:
        return x * _sigmoid(_sigmoid_argument(x, ACTIVATION))


@triton.jit
def _sigmoid_argument(x, ACTIVATION: tl.constexpr):
    """g(x) of the activations x * sigmoid(g(x)).

    In the tanh form (1 + tanh(u)) / 2 is sigmoid(2 u): one exponential, and no cancellation where u is very negative.
    """
    if ACTIVATION == "gelu_tanh":
        return (x + x * x * x * _TANH_CUBIC) * (2.0 * _TANH_SCALE)
    elif ACTIVATION == "gelu_quick":
        return x * _QUICK_SCALE
    else:
        return x


@triton.jit
def _through_activation(dy, x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """dy * d activation(x) / dx, to be rounded to DTYPE: what a gradient becomes on its way back."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, dy)  # 0 also where dy is infinite
    else:
        return dy * _derivative(x, ACTIVATION, DTYPE)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    if ACTIVATION == "gelu":
        density = tl.exp2(-x * x * (0.5 * LOG2_E)) * _INV_SQRT_2PI
        # Where the density is zero, x may be infinite.
        return _normal_cdf(x, DTYPE) + tl.where(density == 0.0, 0.0, x * density)
    else:
        decay = tl.exp2(-_sigmoid_argument(x, ACTIVATION) * LOG2_E)
        probability = 1.0 / (1.0 + decay)
        # sigmoid'(g), where x g' magnifies what 1 - probability would lose near 1: zero where sigmoid has
        # saturated, also when x g' has overflowed.
        tail = probability * tl.where(decay < 1.0, decay * probability, 1.0 - probability)
        return probability + tl.where(tail == 0.0, 0.0, x * _sigmoid_slope(x, ACTIVATION) * tail)


@triton.jit
def _sigmoid_slope(x, ACTIVATION: tl.constexpr):
    """g'(x), a tile in any case."""
    if ACTIVATION == "gelu_tanh":
        return (1.0 + x * x * (3.0 * _TANH_CUBIC)) * (2.0 * _TANH_SCALE)
    elif ACTIVATION == "gelu_quick":
        return tl.full(x.shape, _QUICK_SCALE, tl.float32)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
