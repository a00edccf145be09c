"""Attention by PyTorch's operator, or by blocks of operators where that would hold all scores at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # bound here: F's may be replaced by ours
)

from fastattn import dispatch, reference
from fastattn.ops._attention_call import Features
from fastattn.ops._attention_operators import Result, run_attention
from fastattn.ops._attention_quantized import run_rounded
from fastattn.ops._autograd import needs_graph

# Below this many scores nobody needs to ask whether PyTorch's operator would hold them all, or to fear for a mask.
_FEW_SCORES = 1 << 16
_SDPA_MATH = 0  # torch.nn.attention.SDPBackend.MATH, as torch._fused_sdp_choice returns it
_SDPA_CHOOSES = ("cpu", "cuda", "xpu")  # where PyTorch has that function


def run_torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Result:
    """A checked call by PyTorch's operator, or by blocks of operators where that does not serve it."""
    if features is not None and features.quantize is not None:
        return run_rounded(run_torch_attention, q, k, v, causal, scale, features, return_lse)
    if _blockwise_reason(q, k, v, causal, scale, features, return_lse) is not None:
        return run_attention("blockwise", q, k, v, causal, scale, features, return_lse)
    # A single query at the bottom right sees every key.
    is_causal = causal is not False and not (causal == "bottom_right" and q.size(2) == 1)
    mask: Tensor | None = None
    if features is not None:
        mask = features.mask if features.bias is None else features.bias
    if _needs_mask(q, k, causal, features):
        seen = _visible_keys(q, k, causal, features)
        mask, is_causal = seen if mask is None else mask & seen, False
    grouped = False
    if q.size(1) != k.size(1):  # a branch: with dynamic shapes the comparison itself is not a plain bool
        grouped = True
    return torch_sdpa(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def refuse_torch_attention(q: Tensor, *others: Any) -> str | None:
    """Blocks of PyTorch operators are no PyTorch operator: transforms cannot look into them."""
    reason = dispatch.refuse_transforms()
    if reason is None or _blockwise_reason(q, *others) is None:
        return None
    return reason


def describe_torch(*arguments: Any) -> str:
    features = arguments[5]
    if features is not None and features.quantize is not None:
        described = describe_torch(*arguments[:5], features._replace(quantize=None), *arguments[6:])
        return f"{described}, of values rounded to e4m3 and back in float32: the kernels' numbers without their speed"
    reason = _blockwise_reason(*arguments)
    if reason is None:
        return "torch.nn.functional.scaled_dot_product_attention"
    return f"blocks of PyTorch operators in linear memory ({reason})"


def _blockwise_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> str | None:
    """Why PyTorch's own operator does not serve this call in linear memory, or None."""
    if return_lse:
        return "PyTorch's operator does not return the log-sum-exp"
    if features is not None:
        asked = [name for name in _NEEDS_BLOCKS if getattr(features, name) is not None]
        asked += ["dropout_p"] * bool(
            features.dropout_p
        )  # always, so that a seed drops the same whatever else is asked
        if asked:
            return f"PyTorch's operator does not take {asked[0]}"
        if features.bias is not None and needs_graph(features.bias):
            return "PyTorch's operator holds all scores for the gradient of a bias"
        if features.bias is not None and features.bias.dtype not in (q.dtype, torch.float32):
            return f"PyTorch's operator takes no bias of {features.bias.dtype} with {q.dtype}"
        if features.bias is not None and (causal is not False or features.mask is not None):
            return "PyTorch's operator does not take a bias with another mask"
        if features.deterministic and q.device.type != "cpu":
            return "PyTorch's operator is not deterministic on every device"
    if causal is not False and scale is not None and scale <= 0:
        return f"PyTorch's operator masks before it scales, which gives NaN with scale={scale}"
    few = not torch.compiler.is_compiling() and q.size(2) * k.size(2) <= _FEW_SCORES
    if _needs_mask(q, k, causal, features):
        return None if few else "PyTorch's operator would need a mask of all scores"
    if few:
        return None
    mask = None if features is None else features.bias if features.mask is None else features.mask
    if holds_all_scores(q, k, v, mask, 0.0, causal is not False, None, q.size(1) != k.size(1)):
        return "PyTorch's operator would hold all scores at once"
    return None


_NEEDS_BLOCKS = ("softcap", "alibi_slopes", "sinks", "key_lengths", "cu_seqlens_q")


def _needs_mask(q: Tensor, k: Tensor, causal: bool | str, features: Features | None) -> bool:
    """Whether PyTorch's operator knows what a query sees only from a mask of all scores."""
    if features is not None and (features.window is not None or (causal and features.mask is not None)):
        return True
    return causal == "bottom_right" and q.size(2) != k.size(2) and q.size(2) != 1


def _visible_keys(q: Tensor, k: Tensor, causal: bool | str, features: Features | None) -> Tensor:
    """(seq_q, seq_k), bool: what causal and window let each query see."""
    sizes = q.size(2), k.size(2)
    seen = reference.causal_mask(*sizes, causal, q.device) if causal else None
    if features is not None and features.window is not None:
        window = reference.window_mask(*sizes, features.window, causal, q.device)
        seen = window if seen is None else seen & window
    assert seen is not None  # asked for where one of the two is there
    return seen


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
        # The compiler cannot ask; no fused path takes these on every device.
        if dropout_p or q.size(-1) != v.size(-1) or needs_graph(mask):
            return True
        return not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if q.size(-2) * k.size(-2) <= _FEW_SCORES or q.device.type not in _SDPA_CHOOSES:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    return choice == _SDPA_MATH
