"""Attention in PyTorch operators, one block of queries at a time, so that memory stays linear.

Serves what PyTorch's fused operator has no path for (windows, the log-sum-exp and its gradient, packed sequences,
...), on every device and in every floating dtype. Same signatures as the launchers in fastattn.kernels. The
backward recomputes each block from the saved log-sum-exp, as FlashAttention does (Dao et al., 2022, algorithm 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn.dispatch import autocasts
from fastattn.kernels._layout import empty_gradient, empty_out, empty_rows
from fastattn.kernels._options import AttentionOptions
from fastattn.ops._attention_blocks import Piece, pieces, scaled_product

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
def attention_blockwise_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Returns out (batch, heads, seq_q, v_dim) and lse (batch, heads, seq_q).

    lse is the natural logarithm, in float32 or wider. `options` are the fields of AttentionOptions.
    """
    given = AttentionOptions(*options)
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    if given.cu_seqlens_q is not None:  # rows may lie in no sequence
        out.zero_()
        lse.fill_(-math.inf)
    sinks = _sinks(given, lse.dtype)
    for piece in pieces(q, k, v, given):
        for rows, keys in piece.blocks():
            place = piece.place(rows)
            _forward_block(piece, rows, keys, q[place], sinks, out[place], lse[place])
    return out, lse


def _forward_block(
    piece: Piece, rows: slice, keys: slice, q: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Writes out and lse of one block."""
    if keys.start == keys.stop:
        out.zero_()
        lse.copy_(lse.new_full((1,), -math.inf) if sinks is None else sinks[..., 0])
        return
    scores, _ = piece.scores(piece.by_key(q), rows, keys)
    pivot = scores.amax(dim=-1, keepdim=True)  # (batch, heads, rows, 1)
    if sinks is not None:
        pivot = torch.maximum(pivot, sinks)
    pivot = _finite(pivot)
    weights = scores.sub_(pivot).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks - pivot)
    torch.add(total.log(), pivot, out=lse.unsqueeze(-1))
    # The pivot's own weight is 1, so that only a fully masked row's total is less.
    total.clamp_(min=1.0)
    dropout_p = piece.options.dropout_p
    if dropout_p:
        weights *= piece.keep(rows, keys)
        total *= 1.0 - dropout_p if dropout_p < 1.0 else 1.0
    torch.div(piece.by_head(torch.bmm(piece.by_key(weights), piece.v[:, keys])), total, out=out)


@_in_given_dtypes
def attention_blockwise_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, dbias and dsinks, each like its tensor; one that is not needed is an empty tensor.

    With P the weights, Z = keep / (1 - p) the dropout, S the scores and t = softcap * tanh(scale * q k^T / softcap):

        dV = (P * Z)^T dO;  dP = (dO V^T) * Z;  delta = rowsum(dO * O) - dlse;  dS = P * (dP - delta)
        dbias = dS;  dsinks = -sum(exp(sink - lse) * delta);  dT = dS * (1 - (t / softcap)^2)
        dQ = scale * dT K;  dK = scale * dT^T Q
    """
    given = AttentionOptions(*options)
    wide = lse.dtype
    # Packed rows and keys may lie in no sequence, and padding and keys without heads get no gradient either.
    covered = given.cu_seqlens_q is None and given.key_lengths is None and q.size(1) > 0
    dq, dk, dv = (_empty_like(t, n, covered) for t, n in zip((q, k, v), needs, strict=False))
    dbias = _zeros_like(given.bias, needs[3], wide)
    dsinks = _zeros_like(given.sinks, needs[4], wide)
    whole = _Rows(q, dout, out, lse, dlse, dq if needs[0] else None)
    for piece in pieces(q, k, v, given):
        sums = _Sums(
            dk=_zeros_like(piece.k, needs[1], wide),
            dv=_zeros_like(piece.v, needs[2], wide),
            dbias=dbias,
            dsinks=dsinks,
        )
        for rows, keys in piece.blocks():
            _backward_block(piece, rows, keys, whole.at(piece.place(rows)), sums)
        for gradient, total in ((dk, sums.dk), (dv, sums.dv)):
            if total is not None:
                place = gradient[piece.batch, :, piece.keys]
                place.copy_(total.view(place.shape))
    return (
        dq,
        dk,
        dv,
        q.new_empty(0) if dbias is None else empty_gradient(given.bias).copy_(dbias),  # type: ignore[arg-type]
        q.new_empty(0) if dsinks is None else dsinks.to(given.sinks.dtype),  # type: ignore[union-attr]
    )


class _Rows(NamedTuple):
    """What has a row for each query: all of them, or a block's. dq is written."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    dq: Tensor | None

    def at(self, part: tuple[slice, slice, slice]) -> _Rows:
        return _Rows(
            q=self.q[part],
            dout=self.dout[part],
            out=self.out[part],
            lse=self.lse[part],
            dlse=None if self.dlse is None else self.dlse[part],
            dq=None if self.dq is None else self.dq[part],
        )


class _Sums(NamedTuple):
    """Gradients that are sums over query rows, wide; None where not needed."""

    dk: Tensor | None  # (batch * kv_heads, keys, head_dim)
    dv: Tensor | None  # (batch * kv_heads, keys, v_dim)
    dbias: Tensor | None  # like the whole call's bias
    dsinks: Tensor | None  # (heads,)


def _backward_block(piece: Piece, rows: slice, keys: slice, block: _Rows, sums: _Sums) -> None:
    """Writes dq of one block and adds the rest to the sums."""
    through_scores = not (block.dq is None and sums.dk is None and sums.dbias is None)
    dout = block.dout.to(piece.k.dtype)
    lse = block.lse.unsqueeze(-1)  # (batch, heads, rows, 1)
    delta = _delta(dout, block, lse)
    sinks = _sinks(piece.options, lse.dtype)
    if sums.dsinks is not None and sinks is not None:
        sums.dsinks.sub_((torch.exp(sinks - _finite(lse)) * delta).sum(dim=(0, 2, 3)))
    if keys.start == keys.stop:
        if block.dq is not None:
            block.dq.zero_()
        return
    if not through_scores and sums.dv is None:
        return
    queries, dout = piece.by_key(block.q), piece.by_key(dout)
    scores, slope = piece.scores(queries, rows, keys)
    weights = scores.sub_(_finite(lse)).exp_()
    dropout_p = piece.options.dropout_p
    keep = piece.keep(rows, keys) if dropout_p else None
    kept_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if sums.dv is not None:
        kept = weights if keep is None else weights * keep
        sums.dv[:, keys].baddbmm_(piece.by_key(kept).transpose(1, 2), dout, alpha=kept_scale)
    if not through_scores:
        return
    dscores = piece.by_head(scaled_product(dout, piece.v[:, keys].transpose(1, 2), kept_scale))
    if keep is not None:
        dscores *= keep
    dscores.sub_(delta).mul_(weights)
    if sums.dbias is not None:
        place = piece.part(sums.dbias, rows, keys)
        place += dscores.sum_to_size(place.shape)
    if slope is not None:
        dscores *= slope
    _add_products(piece, keys, piece.by_key(dscores), queries, block.dq, sums.dk)


def _add_products(
    piece: Piece, keys: slice, dscores: Tensor, queries: Tensor, dq: Tensor | None, dk: Tensor | None
) -> None:
    """dQ = scale * dS K, and dK += scale * dS^T Q."""
    scale = piece.options.scale
    if dq is not None:
        dq.copy_(piece.by_head(scaled_product(dscores, piece.k[:, keys], scale)))
    if dk is not None:
        dk[:, keys].baddbmm_(dscores.transpose(1, 2), queries, alpha=scale)


def _delta(dout: Tensor, block: _Rows, lse: Tensor) -> Tensor:
    """rowsum(dO * O) - dlse, (batch, heads, rows, 1)."""
    delta = (dout * block.out).sum(dim=-1, keepdim=True)
    if block.dlse is not None:
        delta -= block.dlse.unsqueeze(-1)
    # A fully masked row has no gradient, whatever comes in: 0 * NaN would spoil that of every key.
    return delta.masked_fill_(lse == -math.inf, 0.0)


def _empty_like(tensor: Tensor, needed: bool, covered: bool) -> Tensor:
    """A gradient to be written; of zeros where blocks do not cover it."""
    if not needed:
        return tensor.new_empty(0)
    return empty_rows(tensor) if covered else empty_rows(tensor).zero_()


def _zeros_like(tensor: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not needed:
        return None
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _sinks(options: AttentionOptions, dtype: torch.dtype) -> Tensor | None:
    """(1, heads, 1, 1)"""
    return None if options.sinks is None else options.sinks.to(dtype)[None, :, None, None]


def _finite(lse: Tensor) -> Tensor:
    """A finite pivot in place of a fully masked row's -inf, so that exp(-inf - pivot) is 0 and not NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)
