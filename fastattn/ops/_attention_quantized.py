"""Attention of operands rounded to e4m3: what it refuses, and its path through PyTorch's operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.dispatch import NotSupported
from fastattn.ops._autograd import needs_graph

# Of Ada, the oldest with products of e4m3.
_MIN_CAPABILITY = (8, 9)
_MAX_HEAD_DIM = 256


def check_given_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for operands that are in 8 bits already, which would need scales."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise NotSupported(
                f"{name} has dtype={tensor.dtype}; quantize='e4m3' makes its own operands of 16 or 32 bits in each "
                "call, and takes none that were rounded before, with their scales"
            )


def check_quantized(q: Tensor, k: Tensor, v: Tensor, features: Any) -> None:
    """Raises for what no implementation takes with `quantize`."""
    if features.quantize != "e4m3":
        raise ValueError(f"quantize={features.quantize!r} must be None or 'e4m3'")
    if q.dtype not in dispatch.TRITON_DTYPES:
        raise TypeError(f"q has dtype={q.dtype}; quantize='e4m3' takes float16, bfloat16 or float32")
    if features.dropout_p:
        raise NotSupported(
            f"dropout_p={features.dropout_p} must be 0 with quantize='e4m3', which is for inference"
        )
    if needs_graph(q, k, v, features.bias, features.sinks):
        raise NotSupported(
            "quantize='e4m3' has no gradient: call it within torch.no_grad(), or with tensors that require none"
        )
    if dispatch.refuse_transforms() is not None:
        raise NotSupported(
            "quantize='e4m3' has no derivative and no rule for vmap: call it outside torch.func transforms and "
            "forward-mode AD"
        )


def refuse_triton_quantized(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take e4m3 operands of these tensors, which they could take as they are; or None."""
    for name, width in (("head_dim", q.shape[-1]), ("v's head_dim", v.shape[-1])):
        if width > _MAX_HEAD_DIM:
            return f"{name}={width} is above {_MAX_HEAD_DIM}, the most with quantize='e4m3'"
    if not q.is_cuda:
        if dispatch.INTERPRETING and not dispatch.interpreter_rounds_e4m3:
            return "Triton's interpreter cuts digits off where it should round to e4m3"
        return None
    if torch.version.hip is not None:
        return "AMD's 8-bit products on gfx942 take float8_e4m3fnuz, another format than e4m3"
    capability = dispatch._capability(q.device.index)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability} is below {_MIN_CAPABILITY}, the least with products of e4m3"
    return None


def run_rounded(
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Any,
    return_lse: bool,
) -> Any:
    """`run`, an implementation without e4m3, in float32 on q, k and v rounded to e4m3 and back."""
    if scale is None:
        scale = 1.0 / math.sqrt(q.size(-1)) if q.size(-1) else 1.0
    if dispatch.autocasts(q):  # which would take the products below for its own
        with torch.autocast(q.device.type, enabled=False):
            return run_rounded(run, q, k, v, causal, scale, features, return_lse)
    dtype = q.dtype
    if q.numel() and v.numel():
        q, k, v, shift = _round(q, k, v, features)
        # Adding the same to all scores of a query changes nothing where only their differences count.
        if return_lse or features.softcap is not None or features.sinks is not None:
            q = torch.cat([q, shift[..., None]], dim=-1)
            k = torch.cat([k, torch.ones_like(k[..., :1])], dim=-1)
    result = run(q, k, v, causal, scale, features._replace(quantize=None), return_lse)
    return (result[0].to(dtype), result[1]) if return_lse else result.to(dtype)


def _round(q: Tensor, k: Tensor, v: Tensor, features: Any) -> tuple[Tensor, ...]:
    if features.cu_seqlens_q is None:
        return reference.round_e4m3(q, k, v, features.key_lengths)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    rounded = reference.round_e4m3_varlen(
        q, k, v, features.cu_seqlens_q, features.cu_seqlens_k, features.key_lengths
    )
    return tuple(t.transpose(0, 1)[None] for t in rounded)
