"""Attention by its formula; memory is quadratic in the sequence, as the formula is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v by the formula; arguments and semantics of `fastattn.attention`.

    Keys and values are repeated for grouped heads, and the scores exist whole. `keep`, bool
    (batch, heads, seq_q, seq_k), says which weights dropout keeps; without it they are drawn.
    """
    seq_q, seq_k = q.size(2), k.size(2)
    if window is not None and all(side is None or side < 0 for side in window):
        window = None
    if key_lengths is not None:
        k, v = (_without_padding(t, key_lengths) for t in (k, v))
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = _scores(q, k, scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - _alibi(alibi_slopes, seq_q, seq_k, scores.dtype)
    hidden = _hidden(seq_q, seq_k, causal, window, mask, key_lengths, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    # The first query of a top-left mask sees the first key; at the bottom right it may see none.
    every_row_sees = causal != "bottom_right" or seq_q <= seq_k
    if not (bias is None and mask is None and window is None and key_lengths is None):
        every_row_sees = False
    if sinks is not None:
        sink_scores = sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
        every_row_sees = False
    weights = _softmax(scores, every_row_sees)[..., :seq_k]
    out = _dropout(weights, keep, dropout_p).to(v.dtype) @ v
    return (out, _logsumexp(scores, every_row_sees)) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each packed sequence by itself; sequence n has the rows cu_seqlens[n] to cu_seqlens[n + 1].

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim) and (total_k, kv_heads, v_dim).
        bias, mask, keep: as in `attention`, with sequences in place of the batch and the longest of them as sizes.
        alibi_slopes, key_lengths: likewise.

    Returns:
        out (total_q, heads, v_dim), and with return_lse also lse (heads, total_q). A row in no sequence has out 0 and
        lse -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:2], v.size(-1))
    lse = q.new_full((q.size(1), q.size(0)), -math.inf, dtype=wide)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        sizes = (rows.stop - rows.start, keys.stop - keys.start)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2 and slopes.size(0) > 1:
            slopes = slopes[n]
        of_sequence, lse_of_sequence = attention(
            *(t[where].transpose(0, 1)[None] for t, where in ((q, rows), (k, keys), (v, keys))),
            bias=_of_sequence(bias, n, sizes),
            mask=_of_sequence(mask, n, sizes),
            alibi_slopes=slopes,
            key_lengths=None if key_lengths is None else key_lengths[n : n + 1],
            keep=_of_sequence(keep, n, sizes),
            return_lse=True,
            **options,
        )
        out[rows] = of_sequence[0].transpose(0, 1).to(out.dtype)
        lse[:, rows] = lse_of_sequence[0].to(wide)
    return (out, lse) if return_lse else out


def _of_sequence(tensor: Tensor | None, n: int, sizes: tuple[int, int]) -> Tensor | None:
    """Sequence n's part of a tensor (sequences or 1, heads or 1, seq_q or 1, seq_k or 1), whose 1s broadcast."""
    if tensor is None:
        return None
    places = (slice(n, n + 1), slice(None), slice(sizes[0]), slice(sizes[1]))
    return tensor[
        tuple(slice(None) if size == 1 else p for size, p in zip(tensor.shape, places, strict=True))
    ]


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


def _logsumexp(scores: Tensor, every_row_sees: bool) -> Tensor:
    """log(sum(exp(scores))) in float32 or wider; -inf for a fully masked row, with gradient 0 and not 0/0."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if every_row_sees:
        return torch.logsumexp(scores, dim=-1)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty.squeeze(-1), -math.inf)


def _dropout(weights: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    if keep is None:
        return torch.dropout(weights, dropout_p, train=True) if dropout_p > 0.0 else weights
    return weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0


def _without_padding(keys: Tensor, key_lengths: Tensor) -> Tensor:
    """0 at each batch's keys from key_lengths on: what lies there has weight 0, but 0 * NaN would be NaN."""
    return keys.masked_fill(_padding(key_lengths, keys.size(2))[:, None, :, None], 0.0)


def _padding(key_lengths: Tensor, seq_k: int) -> Tensor:
    return torch.arange(seq_k, device=key_lengths.device) >= key_lengths.unsqueeze(1)


def _alibi(slopes: Tensor, seq_q: int, seq_k: int, dtype: torch.dtype) -> Tensor:
    """slope * |i + seq_k - seq_q - j| for every score; slopes are (heads,) or (batch or 1, heads)."""
    slopes = slopes.to(torch.promote_types(slopes.dtype, dtype))
    row = torch.arange(seq_q, device=slopes.device).unsqueeze(1) + (seq_k - seq_q)
    distance = (row - torch.arange(seq_k, device=slopes.device)).abs()
    return (slopes if slopes.dim() == 2 else slopes[None])[:, :, None, None] * distance


def _hidden(
    seq_q: int,
    seq_k: int,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """True where a query does not see a key, of a shape that broadcasts to the scores; None where every one does."""
    hidden = ~causal_mask(seq_q, seq_k, causal, device) if causal else None
    others = []
    if window is not None:
        others.append(~window_mask(seq_q, seq_k, window, causal, device))
    if mask is not None:
        others.append(~mask)
    if key_lengths is not None:
        others.append(_padding(key_lengths, seq_k)[:, None, None])
    for other in others:
        hidden = other if hidden is None else hidden | other
    return hidden


def causal_mask(seq_q: int, seq_k: int, alignment: bool | str, device: torch.device | None = None) -> Tensor:
    """The boolean mask (seq_q, seq_k) of a causal alignment; True attends."""
    offset = seq_k - seq_q if alignment == "bottom_right" else 0
    return torch.ones(seq_q, seq_k, dtype=torch.bool, device=device).tril(offset)


def window_mask(
    seq_q: int,
    seq_k: int,
    window: tuple[int | None, int | None],
    causal: bool | str = False,
    device: torch.device | None = None,
) -> Tensor:
    """The boolean mask (seq_q, seq_k) of a window (left, right), None or -1 for no bound; True attends.

    The query's own place counts from the end of the keys, as in flash-attn, unless causal="top_left".
    """
    offset = 0 if causal == "top_left" else seq_k - seq_q
    own = torch.arange(seq_q, device=device).unsqueeze(1) + offset
    key = torch.arange(seq_k, device=device)
    left, right = (None if side is None or side < 0 else side for side in window)
    attends = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if left is not None:
        attends &= key >= own - left
    if right is not None:
        attends &= key <= own + right
    return attends
