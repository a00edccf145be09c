"""Attention over packed sequences of different lengths, and over PyTorch's jagged nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Operation, checking
from fastattn.ops._attention_call import Features, check_attention, check_cu_seqlens
from fastattn.ops._attention_triton import refuse_triton_attention
from fastattn.ops.attention import ATTENTION_IMPLEMENTATIONS, cast_attention


def _check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features,
    return_lse: bool,
) -> None:
    starts_q, starts_k = features.cu_seqlens_q, features.cu_seqlens_k
    check_cu_seqlens("cu_seqlens_q", starts_q, q.size(2), features.max_seqlen_q)  # type: ignore[arg-type]
    check_cu_seqlens("cu_seqlens_k", starts_k, k.size(2), features.max_seqlen_k)  # type: ignore[arg-type]
    if starts_q.shape != starts_k.shape:  # type: ignore[union-attr]
        raise ValueError(
            f"cu_seqlens_q is of {starts_q.numel() - 1} sequences and cu_seqlens_k of {starts_k.numel() - 1}"  # type: ignore[union-attr]
        )
    check_attention(q, k, v, causal, scale, features, return_lse)


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    key_lengths: Tensor | None,
    deterministic: bool,
    quantize: str | None,
    return_lse: bool,
) -> tuple[Any, ...]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor (total, heads, head_dim), not {shape}")
    features = Features(
        window, bias, mask, softcap, alibi_slopes, sinks, dropout_p, key_lengths, deterministic,
        cu_seqlens_q, cu_seqlens_k, _longest(cu_seqlens_q, max_seqlen_q), _longest(cu_seqlens_k, max_seqlen_k),
        quantize,
    )  # fmt: skip
    return *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), causal, scale, features, return_lse


def _longest(starts: Any, given: int | None) -> int:
    if given is not None:
        return given
    if not isinstance(starts, Tensor) or starts.dim() != 1 or starts.numel() < 2:
        return 0
    return int(starts.diff().max())


_VARLEN = Operation(
    "attention_varlen", _check_varlen, ATTENTION_IMPLEMENTATIONS, cast=cast_attention, pack=_pack
)


@_VARLEN.public
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,  # an int, because torch.compile takes a default that is a float for an input
    key_lengths: Tensor | None = None,
    deterministic: bool = False,
    quantize: str | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of packed sequences, each with its own queries and keys alone, without padding.

    Sequence n has the queries q[cu_seqlens_q[n]:cu_seqlens_q[n + 1]] and the keys of cu_seqlens_k likewise; its result
    is that of `fastattn.attention` on these. Both lengths may be 0, and differ.

    Args:
        q: (total_q, heads, head_dim), floating.
        k, v: (total_k, kv_heads, head_dim) and (total_k, kv_heads, v_dim) in q's dtype.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32 or int64, rising from 0 to at most total_q or total_k.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more; without them the offsets are read, which waits for
            the device. Rows of a sequence beyond it are not computed.
        causal: as in `fastattn.attention`, within each sequence; True where both offsets are one tensor.
        window, scale, softcap, sinks, dropout_p, deterministic: as in `fastattn.attention`.
        bias, mask: broadcastable to (sequences, heads, max_seqlen_q, max_seqlen_k); rows and keys count from the
            beginning of each sequence.
        alibi_slopes: (heads,) or (sequences, heads).
        key_lengths: (sequences,): keys of a sequence from there on are hidden.
        quantize: as in `fastattn.attention`, with the same error: means of k's channels and scales of v's are a
            sequence's own, and the 128 keys that share a scale are counted from its beginning, so that no sequence has
            a part in another's rounding.
        return_lse: also return the log-sum-exp.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        (total_q, heads, v_dim) in q's dtype; with `return_lse` also (heads, total_q), natural logarithm, float32.
        Rows of no sequence are 0, and -inf.

    Raises:
        TypeError, ValueError, NotSupported: as `fastattn.attention` does; offsets on a GPU are checked within
            `fastattn.debug_checks()` only, and nothing outside the tensors is read whatever they hold.

    Source:
        The packing is that of flash-attn's `flash_attn_varlen_func` (Dao, 2023).
    """
    result = _VARLEN(
        implementation,
        *_pack(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, scale, bias, mask,
            softcap, alibi_slopes, sinks, dropout_p, key_lengths, deterministic, quantize, return_lse,
        ),
    )  # fmt: skip
    if return_lse:
        return result[0][0].transpose(0, 1), result[1][0]
    return result[0].transpose(0, 1)


def refuse_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why the kernels do not take a call of `scaled_dot_product_attention` on nested tensors, or None."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_nested or tensor.layout != torch.jagged:
            return f"{name} is not nested in the jagged layout, as query is"
        if tensor.dim() != 4 or getattr(tensor, "_ragged_idx", None) != 2:
            return f"{name} is not (batch, heads, seq, head_dim) with the sequence ragged"
        if getattr(tensor, "_lengths", None) is not None:
            return f"{name} has holes between its sequences"
    if attn_mask is not None:
        return "attn_mask goes with no nested tensor"
    if not (isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p <= 1.0):
        return f"dropout_p={dropout_p!r} is no number from 0 to 1"
    (starts_k, *_), (starts_v, *_) = _lengths(key), _lengths(value)
    if starts_k is not starts_v and checking(starts_k) and not torch.equal(starts_k, starts_v):
        return "key and value are ragged in different ways"
    if _values(key).size(0) != _values(value).size(0):
        return "key and value have different numbers of rows"
    if not query.size(0) == key.size(0) == value.size(0) or not query.dtype == key.dtype == value.dtype:
        return "the batches or dtypes differ"
    heads, kv_heads = query.size(1), key.size(1)
    if kv_heads != value.size(1) or (heads != kv_heads and not (enable_gqa and heads % kv_heads == 0)):
        return f"{heads} heads, {kv_heads} of key and {value.size(1)} of value do not fit together"
    if query.size(3) != key.size(3):
        return f"head_dim={query.size(3)} of query is not key's {key.size(3)}"
    q, k, v = (_values(t)[None].transpose(1, 2) for t in (query, key, value))
    return refuse_triton_attention(q, k, v)


def _values(nested: Tensor) -> Tensor:
    """(total, heads, head_dim) of a jagged (batch, heads, seq, head_dim)."""
    values: Tensor = nested.transpose(1, 2).values()
    return values


def nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` of jagged nested tensors by the kernels; see `refuse_nested`."""
    (starts_q, longest_q, shortest_q), (starts_k, longest_k, _) = _lengths(query), _lengths(key)
    q, k, v = (_values(tensor) for tensor in (query, key, value))
    out = attention_varlen(
        q,
        k,
        v,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        causal="top_left" if is_causal else False,
        scale=scale,
        dropout_p=dropout_p,
        implementation="triton",
    )
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        out, starts_q, min_seqlen=shortest_q, max_seqlen=longest_q
    )
    return nested.transpose(1, 2)


def _lengths(nested: Any) -> tuple[Tensor, int, int]:
    """Offsets of the sequences, the longest and the shortest."""
    return nested.offsets(), nested._get_max_seqlen(), nested._get_min_seqlen()
