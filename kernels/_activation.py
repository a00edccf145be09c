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


# In the interpreter a constexpr times a tensor is a constexpr: constants stand to the right of tensors.


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # and not tl.maximum, which would drop a NaN
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
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
def _through_activation(dy, x, ACTIVATION: tl.constexpr):
    """dy * d activation(x) / dx: what a gradient becomes on its way back through the activation."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, dy)  # 0 also where dy is infinite
    else:
        return dy * _derivative(x, ACTIVATION)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        density = tl.exp2(-x * x * (0.5 * LOG2_E)) * _INV_SQRT_2PI
        # Where the density is zero, x may be infinite.
        return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + tl.where(density == 0.0, 0.0, x * density)
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
