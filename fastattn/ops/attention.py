"""Softmax attention: registered operators, autograd Function, implementations, public functions."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # bound here: F's may be replaced by ours
)

from fastattn import dispatch, reference
from fastattn.dispatch import Implementation, Operation, autocasts
from fastattn.kernels._layout import empty_rows
from fastattn.ops._autograd import needs_graph, refuse_second_derivative
from fastattn.ops._check import check_attention_shapes, check_floating, check_same_device
from fastattn.ops._register import register

# The widest head whose backward fits in registers and shared memory without spilling.
_MAX_HEAD_DIM = 256

# Below this many scores nobody needs to ask whether PyTorch's operator would hold them all.
_FEW_SCORES = 1 << 16
_SDPA_MATH = 0  # torch.nn.attention.SDPBackend.MATH, as torch._fused_sdp_choice returns it
_SDPA_CHOOSES = ("cpu", "cuda", "xpu")  # where PyTorch has that function

# The oldest NVIDIA architecture whose shared memory holds the kernels' tiles.
_MIN_CAPABILITY = (8, 0)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_rows(q), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: str,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[Tensor, ...]:
    needs = ((q, needs_dq), (k, needs_dk), (v, needs_dv))
    return tuple(empty_rows(t) if needed else t.new_empty(0) for t, needed in needs)


_FORWARD = "(Tensor q, Tensor k, Tensor v, float scale, str causal) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str causal,"
    " bool needs_dq, bool needs_dk, bool needs_dv) -> (Tensor dq, Tensor dk, Tensor dv)"
)
# One pair of operators for each way to compute: the Triton kernels, and blocks of PyTorch operators.
_forward = {
    "triton": register("attention_forward" + _FORWARD, "kernels.attention_forward", _fake_forward),
    "blockwise": register("attention_blockwise_forward" + _FORWARD, "ops.attention_blockwise", _fake_forward),
}
_backward = {
    "triton": register("attention_backward" + _BACKWARD, "kernels.attention_backward", _fake_backward),
    "blockwise": register(
        "attention_blockwise_backward" + _BACKWARD, "ops.attention_blockwise", _fake_backward
    ),
}


class AttentionFunction(torch.autograd.Function):
    """(out, lse) with gradients through both. Saves the inputs, out and lse; nothing of size seq_q x seq_k."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: str, kind: str
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward[kind](q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal, ctx.kind = scale, causal, kind
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = _backward[ctx.kind](dout, dlse, q, k, v, out, lse, ctx.scale, ctx.causal, *needed)
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative("fastattn.attention", gradients, (q, k, v, dout, dlse))
        return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None)


def apply_attention(
    kind: str, q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if scale is None:
        scale = _default_scale(q)
    alignment = _alignment(causal)
    if needs_graph(q, k, v):
        if torch.compiler.is_compiling():
            # The compiler refuses a Function that is given one tensor twice.
            k, v = k.view_as(k), v.view_as(v)
        out, lse = AttentionFunction.apply(q, k, v, scale, alignment, kind)
    else:
        out, lse = _forward[kind](q, k, v, scale, alignment)
    return (out, lse) if return_lse else out


def _default_scale(q: Tensor) -> float:
    head_dim = q.size(-1)
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


def _alignment(causal: bool | str) -> str:
    """ "none", "top_left" or "bottom_right"; plain True comes with equal lengths, where the two agree."""
    if isinstance(causal, str):
        return causal
    return "top_left" if causal else "none"


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None, return_lse: bool
) -> None:
    # Asked in one expression first, because a call by keyword for each check costs a microsecond of host time.
    if not (
        isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        and q.is_floating_point() and k.is_floating_point() and v.is_floating_point()
    ):  # fmt: skip
        check_floating(q=q, k=k, v=v)
    check_attention_shapes(q, k, v)
    if not q.device == k.device == v.device:
        check_same_device("q", q, k=k, v=v)
    if not (q.dtype == k.dtype == v.dtype) and not autocasts(q):
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if causal is False or causal == "top_left" or causal == "bottom_right":
        return
    if causal is not True:
        raise ValueError(f"causal={causal!r} must be False, True, 'top_left' or 'bottom_right'")
    if q.size(2) != k.size(2):
        raise ValueError(
            f"causal=True is ambiguous with seq_q={q.size(2)} and seq_k={k.size(2)}: "
            "say causal='top_left' (PyTorch's is_causal) or causal='bottom_right' (flash-attn's)"
        )


def cast_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Any, ...]:
    """Autocast as for PyTorch's operator: every operand but float64 takes the autocast dtype."""
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype after autocast, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    return (q, k, v, *others)


def refuse_triton_attention(q: Tensor, *others: Any) -> str | None:
    reason = dispatch.refuse_triton(q, q.dtype, _MIN_CAPABILITY)
    if reason is not None:
        return reason
    if q.size(-1) > _MAX_HEAD_DIM:
        return f"head_dim={q.size(-1)} is above {_MAX_HEAD_DIM}"
    if q.size(-1) == 0:
        return "head_dim=0 is below 1"
    if dispatch.INTERPRETING and q.dtype == torch.bfloat16 and not dispatch.interpreter_multiplies_bfloat16:
        return "Triton's interpreter multiplies bfloat16 as integers"
    return None


def _blockwise_reason(
    q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None, return_lse: bool
) -> str | None:
    """Why PyTorch's own operator does not serve this call in linear memory, or None."""
    if return_lse:
        return "PyTorch's operator does not return the log-sum-exp"
    if causal == "bottom_right" and q.size(2) != k.size(2) and q.size(2) != 1:
        return "PyTorch's operator has no bottom-right alignment"
    if causal is not False and scale is not None and scale <= 0:
        return f"PyTorch's operator masks before it scales, which gives NaN with scale={scale}"
    if q.size(2) * k.size(2) <= _FEW_SCORES and not torch.compiler.is_compiling():
        return None
    if holds_all_scores(q, k, v, None, 0.0, causal is not False, None, q.size(1) != k.size(1)):
        return "PyTorch's operator would hold all scores at once"
    return None


def holds_all_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> bool:
    """Whether PyTorch's operator is known to take its path of quadratic memory, with more than a few scores."""
    if torch.compiler.is_compiling():
        # The compiler cannot ask; no fused path takes other strides.
        return not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if q.size(-2) * k.size(-2) <= _FEW_SCORES or q.device.type not in _SDPA_CHOOSES:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    return choice == _SDPA_MATH


def _refuse_torch(q: Tensor, *others: Any) -> str | None:
    """Blocks of PyTorch operators are no PyTorch operator: transforms cannot look into them."""
    reason = dispatch.refuse_transforms()
    if reason is None or _blockwise_reason(q, *others) is None:
        return None
    return reason


def _run_torch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if _blockwise_reason(q, k, v, causal, scale, return_lse) is not None:
        return apply_attention("blockwise", q, k, v, causal, scale, return_lse)
    # A single query at the bottom right sees every key.
    is_causal = causal is not False and not (causal == "bottom_right" and q.size(2) == 1)
    grouped = False
    if q.size(1) != k.size(1):  # a branch: with dynamic shapes the comparison itself is not a plain bool
        grouped = True
    return torch_sdpa(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def _describe_torch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None, return_lse: bool
) -> str:
    reason = _blockwise_reason(q, k, v, causal, scale, return_lse)
    if reason is None:
        return "torch.nn.functional.scaled_dot_product_attention"
    return f"blocks of PyTorch operators in linear memory ({reason})"


_ATTENTION = Operation(
    "attention",
    _check,
    (
        Implementation(
            "triton",
            run=lambda *arguments: apply_attention("triton", *arguments),
            refuse=refuse_triton_attention,
            describe=lambda *arguments: "fused Triton kernels, memory linear in the sequence",
        ),
        Implementation("torch", run=_run_torch, refuse=_refuse_torch, describe=_describe_torch),
        Implementation(
            "reference",
            run=lambda q, k, v, causal, scale, return_lse: reference.attention(
                q, k, v, causal=causal, scale=scale, return_lse=return_lse
            ),
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators, holding all scores",
            only_by_name=True,
        ),
    ),
    cast=cast_attention,
)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@_ATTENTION.public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in memory linear in the sequence.

    .. math::
        O_i = \sum_j P_{ij} V_j, \qquad P_{ij} = \exp(s\, Q_i \cdot K_j - L_i), \qquad
        L_i = \log \sum_j \exp(s\, Q_i \cdot K_j)

    with j over the keys that query i may see.

    Args:
        q: (batch, heads, seq_q, head_dim), floating.
        k, v: (batch, kv_heads, seq_k, head_dim) in q's dtype; kv_heads divides heads, and query head h reads
            key head h // (heads // kv_heads) (grouped-query attention), without a repeated copy.
        causal: False; "top_left": query i sees keys j <= i, PyTorch's `is_causal`; "bottom_right": keys
            j <= i + seq_k - seq_q, flash-attn's `causal`; True where seq_q == seq_k, so that both agree.
        scale: s, 1 / sqrt(head_dim) by default; any finite number.
        return_lse: also return L.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        O, of q's shape and dtype, and strides where q has no holes; with `return_lse` also L,
        (batch, heads, seq_q), natural logarithm, float32 (float64 for float64), differentiable as well.
        A query that sees no key has O = 0, L = -inf and no gradient.

    Raises:
        TypeError: a tensor is not floating-point, or the dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or an argument's value is unknown.
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Triton: products of 16-bit inputs accumulate in float32, and so does the softmax; float32 products are full
        float32, not TF32. The backward is deterministic and saves q, k, v, O and L. Any strides with a contiguous
        last dimension are read in place; another layout is copied. A second derivative raises. PyTorch's operator,
        where it runs, follows PyTorch's own settings.
        Under autocast all operands are cast to its dtype, as PyTorch's operator does. Within torch.func transforms
        and forward-mode AD, calls go to PyTorch's operator, or are refused where it has no path.

    Source:
        Dao, "FlashAttention-2" (2023), algorithms 1 and 2; Milakov and Gimelshein, "Online normalizer
        calculation for softmax" (2018).
    """
    return _ATTENTION(implementation, q, k, v, causal, scale, return_lse)
