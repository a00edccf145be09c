"""LayerNorm and RMSNorm, alone and behind a residual sum: the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Operation
from fastattn.ops._norm_call import (
    ADD_LAYER,
    ADD_RMS,
    IMPLEMENTATIONS,
    LAYER,
    RMS,
    Features,
    Shape,
    at_once,
    check,
)

_Call = tuple[Tensor, Tensor | None, Shape, Tensor | None, Tensor | None, float | None, Features]


# The arguments of the operations, of those of the public functions: `explain` is given the latter.
def _pack_layer(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    zero_centered_weight: bool,
    out_dtype: torch.dtype | None,
    return_statistics: bool,
    save: str,
) -> _Call:
    features = LAYER
    if zero_centered_weight or return_statistics or out_dtype is not None or save != "input":
        features = Features(False, False, zero_centered_weight, out_dtype, return_statistics, save)
    return x, None, normalized_shape, weight, bias, eps, features


def _pack_rms(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float | None,
    zero_centered_weight: bool,
    out_dtype: torch.dtype | None,
    return_statistics: bool,
    save: str,
) -> _Call:
    features = RMS
    if zero_centered_weight or return_statistics or out_dtype is not None or save != "input":
        features = Features(True, False, zero_centered_weight, out_dtype, return_statistics, save)
    return x, None, normalized_shape, weight, None, eps, features


def _pack_add_layer(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    zero_centered_weight: bool,
    residual_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    return_statistics: bool,
    save: str,
) -> _Call:
    features = _features_of_sum(
        False, zero_centered_weight, out_dtype, return_statistics, save, dropout_p, rowscale, residual_dtype
    )
    return x, residual, normalized_shape, weight, bias, eps, features


def _pack_add_rms(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float | None,
    dropout_p: float,
    rowscale: Tensor | None,
    zero_centered_weight: bool,
    residual_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    return_statistics: bool,
    save: str,
) -> _Call:
    features = _features_of_sum(
        True, zero_centered_weight, out_dtype, return_statistics, save, dropout_p, rowscale, residual_dtype
    )
    return x, residual, normalized_shape, weight, None, eps, features


def _features_of_sum(
    rms: bool,
    zero_centered_weight: bool,
    out_dtype: torch.dtype | None,
    return_statistics: bool,
    save: str,
    dropout_p: float,
    rowscale: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> Features:
    asked = zero_centered_weight or return_statistics or save != "input" or dropout_p != 0
    if asked or out_dtype is not None or rowscale is not None or residual_dtype is not None:
        given = (
            zero_centered_weight,
            out_dtype,
            return_statistics,
            save,
            dropout_p,
            rowscale,
            residual_dtype,
        )
        return Features(rms, True, *given)
    return ADD_RMS if rms else ADD_LAYER


_LAYER_NORM = Operation("layer_norm", check, IMPLEMENTATIONS, pack=_pack_layer, at_once=at_once)
_RMS_NORM = Operation("rms_norm", check, IMPLEMENTATIONS, pack=_pack_rms, at_once=at_once)
_ADD_LAYER_NORM = Operation("add_layer_norm", check, IMPLEMENTATIONS, pack=_pack_add_layer, at_once=at_once)
_ADD_RMS_NORM = Operation("add_rms_norm", check, IMPLEMENTATIONS, pack=_pack_add_rms, at_once=at_once)


@_LAYER_NORM.public
def layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    save: str = "input",
    implementation: str | None = None,
) -> Any:
    r"""Layer normalization over the trailing dimensions, as `torch.nn.functional.layer_norm`.

    .. math::
        y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{variance}(x) + \epsilon}}
        \cdot \text{weight} + \text{bias}

    Args:
        x: (..., *normalized_shape); float16, bfloat16 or float32 for Triton, float64 too otherwise.
        normalized_shape: the trailing dimensions the mean and the (biased) variance are taken over; an int
            stands for one dimension.
        weight: (*normalized_shape), or None for ones. Its dtype may differ from x's.
        bias: (*normalized_shape), or None for zeros. Its dtype may differ from x's.
        eps: added to the variance.
        zero_centered_weight: 1 + weight, in float32, stands for weight.
        out_dtype: y's dtype; None for x's or, under a GPU's autocast, float32 as PyTorch's. Said, it goes before
            autocast: x is read as it is, and no wide copy of y is made.
        return_statistics: mean and 1 / sqrt(variance + eps) are returned too.
        save: what Triton's backward keeps: "input", or "output", from which x is recomputed as
            (y - bias) / weight, where x itself is not needed after the call but y is.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of x's shape, contiguous. With `return_statistics` (y, mean, rstd), these of x's leading dimensions, in
        float32 (float64 of a float64 x) and without gradient.

    Raises:
        TypeError: a tensor is not floating-point, or `normalized_shape` is not made of ints.
        ValueError: shapes or devices do not fit, `save` or `implementation` is unknown, or a weight is 0 with
            save="output" (looked for where that does not wait for a device: on a CPU, and within `debug_checks`).
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Triton: statistics and sums are in float32 at any width; the backward saves x, weight and one float32
        mean and rstd a row, and is deterministic; rows at equal distances are read in place, an x (or an
        incoming gradient) of another layout is copied once; double backward goes through PyTorch's operators.
        save="output": where a weight is 0 and y has a gradient, those of x and of that weight are NaN; where it is
        small beside bias, y has lost digits of x in its rounding that the gradients lack; there is no double backward
        (`NotSupported`).
        PyTorch's operators keep what they keep, whatever `save` says.
        PyTorch's own CPU operator sums the gradients of 16-bit parameters in their dtype, over many rows with
        few correct digits; float32 parameters beside a 16-bit x get float32 sums here.

    Source:
        Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.1, equation 4. Keeping the output: NVIDIA Apex's
        memory-efficient LayerNorm.
    """
    return _LAYER_NORM(
        implementation,
        *_pack_layer(
            x, normalized_shape, weight, bias, eps, zero_centered_weight, out_dtype, return_statistics, save
        ),
    )


@_RMS_NORM.public
def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    save: str = "input",
    implementation: str | None = None,
) -> Any:
    r"""Root mean square normalization over the trailing dimensions, as `torch.nn.functional.rms_norm`.

    .. math::
        y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \epsilon}} \cdot \text{weight}

    Args:
        x, normalized_shape, weight, zero_centered_weight, out_dtype, save, implementation: as in `layer_norm`.
        eps: added to the mean of squares; None for the epsilon of the dtype computed in, as PyTorch's: float32's for
            16-bit x too, float64's for float64.
        return_statistics: 1 / sqrt(mean(x^2) + eps) is returned too.

    Returns:
        y, of x's shape, by Triton contiguous; float32 under a GPU's autocast, unless `out_dtype` says otherwise. With
        `return_statistics` (y, rstd), this of x's leading dimensions, in float32 and without gradient.

    Raises:
        As `layer_norm`.

    Notes:
        As `layer_norm`'s, without a mean; rounded once, after the weight.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    return _RMS_NORM(
        implementation,
        *_pack_rms(
            x, normalized_shape, weight, eps, zero_centered_weight, out_dtype, return_statistics, save
        ),
    )


@_ADD_LAYER_NORM.public
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0,
    rowscale: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    save: str = "input",
    implementation: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The residual sum of a Transformer's block and the LayerNorm behind it, in one pass each way.

    .. math::
        h = \text{residual} + \text{rowscale} \cdot \operatorname{dropout}(x) \qquad
        y = \operatorname{layer\_norm}(h)

    Args:
        x: (..., *normalized_shape), a branch's result; dtypes as in `layer_norm`.
        residual: of x's shape, in any of these dtypes; None for zeros.
        normalized_shape, weight, bias, eps, zero_centered_weight, save, implementation: as in `layer_norm`.
        dropout_p: the probability that an element of x is dropped; the others are divided by 1 - dropout_p. Applied
            whenever it is not 0: pass 0 for inference.
        rowscale: of x's leading dimensions, a factor for each row of x (stochastic depth: 0, or 1 / probability to
            keep); None for ones. It has no gradient.
        residual_dtype: h's dtype; None for that of residual, or of x without one.
        out_dtype: y's dtype; None for x's or, under a GPU's autocast, float32.
        return_statistics: mean and 1 / sqrt(variance + eps) of h are returned too.

    Returns:
        (y, h), by Triton contiguous; with `return_statistics` (y, h, mean, rstd), the last two of x's leading
        dimensions, in float32 and without gradient. h is x itself where nothing is added, dropped, scaled or converted.

    Raises:
        As `layer_norm`; also
        ValueError: residual or rowscale has another shape, or dropout_p is no probability.
        NotSupported: rowscale requires a gradient.

    Notes:
        The sum is made in float32 and rounded once, to h; h as it is rounded is what is normalized. So y is exactly
        layer_norm of the h that is returned, and gradients are those of that; with residual_dtype=torch.float32 nothing
        is lost in between. (flash-attn normalizes the sum before it is rounded, and differentiates at the rounded one.)
        Gradients may arrive at y and at h; Triton's backward takes both in one pass, and where x and residual have one
        dtype and nothing is dropped or scaled, one tensor is the gradient of both.
        Dropout: Triton draws Philox numbers from a seed of PyTorch's generator of x's device, so `torch.manual_seed`
        fixes them, and draws them again in the backward: no mask is stored. PyTorch's operators drop other elements,
        and round the sum's terms in x's dtype. Of an infinite or NaN x, a dropped element is 0 by Triton and NaN by
        PyTorch's operators, which multiply it by 0.
        save="output" keeps y and not h: where the caller does not need h after this, it is not kept alive.
        Otherwise as `layer_norm`'s.

    Source:
        Ba, Kiros and Hinton (2016); dropout: Srivastava et al. (2014); stochastic depth: Huang et al. (2016); Philox:
        Salmon et al. (2011). The fusion is that of flash-attn's layer_norm.
    """
    return _ADD_LAYER_NORM(
        implementation,
        *_pack_add_layer(
            x, residual, normalized_shape, weight, bias, eps, dropout_p, rowscale, zero_centered_weight,
            residual_dtype, out_dtype, return_statistics, save,
        ),
    )  # fmt: skip


@_ADD_RMS_NORM.public
def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0,
    rowscale: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    save: str = "input",
    implementation: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The residual sum of a Transformer's block and the RMSNorm behind it, in one pass each way.

    .. math::
        h = \text{residual} + \text{rowscale} \cdot \operatorname{dropout}(x) \qquad
        y = \operatorname{rms\_norm}(h)

    Args:
        x, residual, dropout_p, rowscale, residual_dtype: as in `add_layer_norm`.
        The rest: as in `rms_norm`.

    Returns:
        (y, h) or, with `return_statistics`, (y, h, rstd), as in `add_layer_norm`.

    Raises:
        As `add_layer_norm`.

    Notes:
        As `add_layer_norm`'s.

    Source:
        Zhang and Sennrich (2019), and as `add_layer_norm`.
    """
    return _ADD_RMS_NORM(
        implementation,
        *_pack_add_rms(
            x, residual, normalized_shape, weight, eps, dropout_p, rowscale, zero_centered_weight,
            residual_dtype, out_dtype, return_statistics, save,
        ),
    )  # fmt: skip
