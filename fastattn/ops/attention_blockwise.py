"""Attention in PyTorch operators, one block of queries at a time, so that memory stays linear.

Serves what PyTorch's fused operator has no path for (bottom-right causal alignment with unequal lengths, the
log-sum-exp and its gradient), on every device and in every floating dtype. Same signatures as the launchers in
fastattn.kernels. The backward recomputes each block from the saved log-sum-exp, as FlashAttention does (Dao et
al., 2022, algorithm 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastattn.dispatch import autocasts
from fastattn.kernels._layout import causal_offset, empty_rows

# Scores that exist at one time, in elements: 16 MiB in float32, a few times a core's cache. At least
# _MIN_ROWS queries make a block, so that a long row of keys still gives matrix products, not vector ones.
_BLOCK_ELEMENTS = 1 << 22
_MIN_ROWS = 16


_F = TypeVar("_F", bound=Callable[..., Any])


def _in_given_dtypes(function: _F) -> _F:
    """Decorator: turns autocast off, which would round the float32 products in here to 16 bits."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        if not autocasts(arguments[0]):
            return function(*arguments)
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return run  # type: ignore[return-value]


@_in_given_dtypes
def attention_blockwise_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: str
) -> tuple[Tensor, Tensor]:
    """Returns out, like q, and lse (batch, heads, seq_q), the natural logarithm, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = empty_rows(q)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    k, v = k.to(wide), v.to(wide)
    for rows, keys in _blocks(q, k, causal):
        scores = _block_scores(q, k, rows, keys, scale, causal)
        block_lse = torch.logsumexp(scores, dim=-1)  # (batch, kv_heads, groups * rows)
        weights = torch.exp(scores - _finite(block_lse).unsqueeze(-1))
        out[:, :, rows] = _ungroup(weights @ v[:, :, keys], q).to(q.dtype)
        lse[:, :, rows] = block_lse.view(*lse[:, :, rows].shape)
    return out, lse


@_in_given_dtypes
def attention_blockwise_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the inputs' dtypes; one that is not needed is an empty tensor.

    With P the weights and S = scale * q k^T: dV = P^T dO, dP = dO V^T, dS = P * (dP - delta),
    delta = rowsum(dO * O) - dlse, dQ = scale * dS K, dK = scale * dS^T Q.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = empty_rows(q) if needs_dq else q.new_empty(0)
    dk = torch.zeros_like(empty_rows(k), dtype=wide) if needs_dk else k.new_empty(0)
    dv = torch.zeros_like(empty_rows(v), dtype=wide) if needs_dv else v.new_empty(0)
    k_wide, v_wide = k.to(wide), v.to(wide)
    for rows, keys in _blocks(q, k, causal):
        scores = _block_scores(q, k_wide, rows, keys, scale, causal)
        block_lse = _group(lse[:, :, rows].unsqueeze(-1), k)
        weights = torch.exp(scores - _finite(block_lse))
        block_dout = _group(dout[:, :, rows], k).to(wide)
        if needs_dv:
            dv[:, :, keys] += weights.transpose(-2, -1) @ block_dout
        if not (needs_dq or needs_dk):
            continue
        delta = (block_dout * _group(out[:, :, rows], k)).sum(dim=-1, keepdim=True)
        if dlse is not None:
            delta -= _group(dlse[:, :, rows].unsqueeze(-1), k)
        # A fully masked row has no gradient, whatever comes in: 0 * NaN would spoil that of every key.
        delta.masked_fill_(block_lse == -math.inf, 0.0)
        dscores = weights * (block_dout @ v_wide[:, :, keys].transpose(-2, -1) - delta) * scale
        if needs_dq:
            dq[:, :, rows] = _ungroup(dscores @ k_wide[:, :, keys], q).to(q.dtype)
        if needs_dk:
            dk[:, :, keys] += dscores.transpose(-2, -1) @ _group(q[:, :, rows], k).to(wide)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(q: Tensor, k: Tensor, causal: str) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the keys that any of its rows may see."""
    seq_q, seq_k = q.size(2), k.size(2)
    if q.size(0) == 0 or q.size(1) == 0:
        return
    elements_per_row = max(1, q.size(0) * q.size(1) * seq_k)
    step = max(_MIN_ROWS, _BLOCK_ELEMENTS // elements_per_row)
    for start in range(0, seq_q, step):
        end = min(seq_q, start + step)
        visible = seq_k if causal == "none" else end + causal_offset(causal, seq_q, seq_k)
        yield slice(start, end), slice(0, min(seq_k, max(0, visible)))


def _block_scores(q: Tensor, k: Tensor, rows: slice, keys: slice, scale: float, causal: str) -> Tensor:
    """Masked scale * q k^T of one block, (batch, kv_heads, groups * rows, keys)."""
    block = _group(q[:, :, rows], k).to(k.dtype)
    scores = scale * (block @ k[:, :, keys].transpose(-2, -1))
    if causal == "none":
        return scores
    row = torch.arange(rows.start, rows.stop, device=q.device).repeat(q.size(1) // k.size(1))
    last_key = row + causal_offset(causal, q.size(2), k.size(2))
    hidden = torch.arange(keys.stop, device=q.device) > last_key.unsqueeze(-1)
    return scores.masked_fill_(hidden, -math.inf)


def _group(rows: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, rows, d) to (batch, kv_heads, groups * rows, d): the heads that share keys, stacked."""
    batch, heads, count, width = rows.shape
    kv_heads = k.size(1)
    return rows.reshape(batch, kv_heads, heads // kv_heads * count, width)


def _ungroup(rows: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_group`, for q's heads."""
    batch, kv_heads, count, width = rows.shape
    return rows.reshape(batch, q.size(1), kv_heads * count // q.size(1), width)


def _finite(lse: Tensor) -> Tensor:
    """0 in place of a fully masked row's -inf, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)
