"""flash-attn's functions on our kernels: its names, arguments, layouts and alignment, in any dtype and on any device.

`from fastattn.flash_attn import flash_attn_func` stands where `from flash_attn import flash_attn_func` stood. What is
the same in all six functions:

- Heads come after the sequence: (batch, seq, heads, head_dim), and packed (total, heads, head_dim).
- `softmax_scale` multiplies q k^T; None for 1 / sqrt(head_dim).
- `causal` lies at the bottom right: query i sees keys j <= i + seq_k - seq_q.
- `window_size=(left, right)`, both included: i + seq_k - seq_q - left <= j <= i + seq_k - seq_q + right. A negative end
  is no bound; with `causal` the right one is 0.
- `softcap=c` above 0 makes the scores c tanh(score / c); otherwise there is none.
- `alibi_slopes`, (heads,) or (batch, heads), float32, adds -slope |i + seq_k - seq_q - j|; it has no gradient.
- `dropout_p` applies whenever it is above 0, without gradients too: pass 0.0 for evaluation.
- `deterministic` asks for gradients equal bit for bit from run to run; the Triton kernels' always are.
- `return_attn_probs` returns (out, softmax_lse, S_dmask). S_dmask, in flash-attn a debugging value of quadratic size,
  is None.

softmax_lse is the logarithm of the softmax's denominator, with everything that is added to the scores, and is
differentiable. A query that sees no key has out 0, softmax_lse -inf and no gradient. In flash-attn softmax_lse has no
gradient, is +inf for such a query, and with ALiBi and `causal` together lacks a constant of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.dispatch import NotSupported
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    r"""Softmax attention with the sequence before the heads; `fastattn.attention` with flash-attn's arguments.

    .. math::
        O_i = \sum_j \mathrm{softmax}_j(s\, Q_i \cdot K_j) V_j

    Args:
        q: (batch, seq_q, heads, head_dim), floating.
        k, v: (batch, seq_k, kv_heads, head_dim) in q's dtype; kv_heads divides heads, and query head h reads key head
            h // (heads // kv_heads). v's head_dim may differ.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: see
            `fastattn.flash_attn`.

    Returns:
        out, (batch, seq_q, heads, head_dim) in q's dtype; with `return_attn_probs` (out, softmax_lse, None),
        softmax_lse (batch, heads, seq_q), natural logarithm, float32 (float64 for float64).

    Raises:
        TypeError, ValueError, NotSupported: as `fastattn.attention` does.

    Source:
        The arguments are those of flash-attn 2.8 (Dao, https://github.com/Dao-AILab/flash-attention).
    """
    _check_shapes(q, k, v, "(batch, seq, heads, head_dim)")
    found = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        ),
    )  # fmt: skip
    if return_attn_probs:
        out, lse = found
        return out.transpose(1, 2), lse, None
    return found.transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with keys and values in one tensor, which is read in place and receives one gradient.

    Args:
        q: (batch, seq_q, heads, head_dim), floating.
        kv: (batch, seq_k, 2, kv_heads, head_dim) in q's dtype.

    The other arguments, returns, raises and source: as `flash_attn_func`.
    """
    k, v = _unpack("kv", kv, 2, "(batch, seq, 2, kv_heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with queries, keys and values in one tensor, which is read in place and receives one gradient.

    Args:
        qkv: (batch, seq, 3, heads, head_dim), floating.

    The other arguments, returns, raises and source: as `flash_attn_func`.
    """
    q, k, v = _unpack("qkv", qkv, 3, "(batch, seq, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of each packed sequence by itself; `fastattn.attention_varlen` with flash-attn's arguments.

    Sequence n has the queries q[cu_seqlens_q[n]:cu_seqlens_q[n + 1]] and the keys of cu_seqlens_k likewise; seq_q and
    seq_k are its own lengths, which may be 0.

    Args:
        q: (total_q, heads, head_dim), floating.
        k, v: (total_k, kv_heads, head_dim) in q's dtype; v's head_dim may differ.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32 or int64, rising from 0 to at most total_q or total_k.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: see
            `fastattn.flash_attn`.
        block_table: None; keys in pages are not supported.

    Returns:
        out, (total_q, heads, head_dim) in q's dtype; with `return_attn_probs` (out, softmax_lse, None), softmax_lse
        (heads, total_q), natural logarithm, float32 (float64 for float64). Rows of no sequence are 0, and -inf.

    Raises:
        TypeError, ValueError, NotSupported: as `fastattn.attention_varlen` does; NotSupported for a block_table.

    Source:
        The arguments are those of flash-attn 2.8 (Dao, https://github.com/Dao-AILab/flash-attention).
    """
    if block_table is not None:
        raise NotSupported("block_table is given: keys and values in pages (a paged cache) are not supported")
    _check_shapes(q, k, v, "(total, heads, head_dim)")
    found = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        ),
    )  # fmt: skip
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor, which is read in place and receives one gradient.

    Args:
        q: (total_q, heads, head_dim), floating.
        kv: (total_k, 2, kv_heads, head_dim) in q's dtype.

    The other arguments, returns, raises and source: as `flash_attn_varlen_func`.
    """
    k, v = _unpack("kv", kv, 2, "(total, 2, kv_heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with everything in one tensor, which is read in place and receives one gradient.

    Args:
        qkv: (total, 3, heads, head_dim), floating.
        cu_seqlens: (batch + 1,), int32 or int64, of queries and keys alike.
        max_seqlen: the longest sequence, or more.

    The other arguments, returns, raises and source: as `flash_attn_varlen_func`.
    """
    q, k, v = _unpack("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The keywords of `fastattn.attention` and `fastattn.attention_varlen`."""
    if causal not in (False, True):
        raise ValueError(f"causal={causal!r} must be False or True; True lies at the bottom right")
    return {
        "causal": "bottom_right" if causal else False,
        "window": _window(window_size),
        "scale": softmax_scale,
        "softcap": None if softcap <= 0 else softcap,
        "alibi_slopes": alibi_slopes,
        # An int, as that of `fastattn.attention`: torch.compile takes a default that is a float for an input.
        "dropout_p": 0 if dropout_p == 0 else dropout_p,
        "deterministic": deterministic,
        "return_lse": return_attn_probs,
    }


def _window(window_size: Any) -> tuple[int, int] | None:
    """(left, right), -1 for no bound, or None without any."""
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(isinstance(end, int) for end in window_size)
    ):
        raise ValueError(
            f"window_size={window_size!r} must be (left, right), each a number of keys or -1 for no bound"
        )
    left, right = window_size
    if left < 0 and right < 0:
        return None
    return (-1 if left < 0 else left, -1 if right < 0 else right)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """What the errors of `fastattn.attention` would show in its own layout."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, tensor, layout)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they may differ in the last size alone"
        )


def _check_rank(name: str, tensor: Any, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {layout}")


def _unpack(name: str, packed: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    """Views of the tensors in a packed one; their gradients come back as one."""
    _check_rank(name, packed, layout)
    if packed.size(-3) != parts:
        raise ValueError(f"{name} has shape {tuple(packed.shape)}, not {layout}")
    return packed.unbind(-3)
