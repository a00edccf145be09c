"""The naive PyTorch maths: the truth that tests measure against, and the baseline of the benchmarks.

Every function works in the dtype of its inputs: given float64 inputs it is the truth, given bfloat16 inputs it
is what a plain PyTorch program computes. Memory is quadratic in the sequence where the formula is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v by the formula; arguments and semantics of `fastattn.attention`.

    Keys and values are repeated for grouped heads, and the scores exist whole.
    """
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = _scores(q, k, scale)
    if causal:
        scores = scores.masked_fill(~causal_mask(q.size(2), k.size(2), causal, q.device), -math.inf)
    # The first query of a top-left mask sees the first key; at the bottom right it may see none.
    every_row_sees = causal != "bottom_right" or q.size(2) <= k.size(2)
    out = _softmax(scores, every_row_sees).to(v.dtype) @ v
    if not return_lse:
        return out
    wide = torch.promote_types(scores.dtype, torch.float32)
    return out, torch.logsumexp(scores.to(wide), dim=-1)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The formula behind `torch.nn.functional.scaled_dot_product_attention`, with its arguments."""
    if enable_gqa:
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    scores = _scores(query, key, scale)
    if is_causal:
        mask = causal_mask(query.size(-2), key.size(-2), "top_left", query.device)
        scores = scores.masked_fill(~mask, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = _softmax(scores, every_row_sees=attn_mask is None)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0.0)
    return weights.to(value.dtype) @ value


def _repeat_heads(keys: Tensor, q: Tensor) -> Tensor:
    heads, kv_heads = q.size(-3), keys.size(-3)
    return keys if heads == kv_heads or kv_heads == 0 else keys.repeat_interleave(heads // kv_heads, dim=-3)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """scale * q k^T, (batch, heads, seq_q, seq_k)."""
    if scale is None:
        scale = 1.0 / math.sqrt(q.size(-1)) if q.size(-1) else 1.0
    return scale * (q @ k.transpose(-2, -1))


def _softmax(scores: Tensor, every_row_sees: bool) -> Tensor:
    """Softmax over the keys; a fully masked row, 0/0 by the formula, gives 0.

    Looking for such rows costs as much as the softmax, so it is left out where every row sees a key.
    """
    if every_row_sees:
        return torch.softmax(scores, dim=-1)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def causal_mask(seq_q: int, seq_k: int, alignment: bool | str, device: torch.device | None = None) -> Tensor:
    """The boolean mask (seq_q, seq_k) of a causal alignment; True attends."""
    offset = seq_k - seq_q if alignment == "bottom_right" else 0
    return torch.ones(seq_q, seq_k, dtype=torch.bool, device=device).tril(offset)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the trailing `normalized_shape` dimensions.

    Computed in float32 where x is narrower, as every implementation does.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x) ("none") or its tanh form ("tanh"), from elementary operators."""
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
