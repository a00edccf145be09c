"""q, k and v as `fastattn.attention(..., quantize="e4m3")` rounds them, in PyTorch operators."""

from __future__ import annotations

import torch
from torch import Tensor

# The largest number of e4m3, and what is too small for a scale of its own: rounded to 0, and its scale is 1.
_LARGEST = 448.0
_LEAST = 2.0**-110
# Keys that share a scale.
_BLOCK = 128


def round_e4m3(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q', k', v', shift): q, k without the keys' mean, and v, rounded to e4m3 and back, in float32.

        q_i . k_j ~ q'_i . k'_j + shift_i        shift_i = q_i . mean        v_j ~ v'_j

    A query has a scale of its own; k one for each 128 keys, of what is left without the mean of each channel; v one a
    channel. What is not finite counts in means as 0, stays out of scales and becomes NaN; keys that `key_lengths` hides
    count nowhere and become 0.

    Args:
        q: (batch, heads, seq_q, head_dim).
        k, v: (batch, kv_heads, seq_k, head_dim) and (batch, kv_heads, seq_k, v_dim).
        key_lengths: (batch,).

    Returns:
        Three tensors of the shapes of q, k and v, and (batch, heads, seq_q).
    """
    q, k, v = (_finite_or_nan(t.to(torch.float32)) for t in (q, k, v))
    # A mean of no keys is 0; lengths beyond the last key are its.
    most = max(1, k.size(2))
    count: int | Tensor = most
    hidden = None
    if key_lengths is not None:
        hidden = (torch.arange(k.size(2), device=k.device) >= key_lengths[:, None])[:, None, :, None]
        k, v = (t.masked_fill(hidden, torch.nan) for t in (k, v))
        count = key_lengths.clamp(1, most)[:, None, None, None]
    mean = _mean_of(k.nansum(2, keepdim=True), count)
    shift = q @ mean.repeat_interleave(q.size(1) // max(1, k.size(1)), dim=1).transpose(2, 3)
    padded = torch.nn.functional.pad(k - mean, (0, 0, 0, -k.size(2) % _BLOCK), value=torch.nan)
    blocks = padded.unflatten(2, (padded.size(2) // _BLOCK, _BLOCK))
    rounded_k = _rounded(blocks, _largest(blocks, (3, 4))).flatten(2, 3)[:, :, : k.size(2)]
    q, k, v = _rounded(q, _largest(q, 3)), rounded_k, _rounded(v, _largest(v, 2))
    if hidden is not None:
        k, v = (t.masked_fill(hidden, 0.0) for t in (k, v))
    return q, k, v, shift[..., 0]


def round_e4m3_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`round_e4m3` of each packed sequence by itself; sequence n has the rows cu_seqlens[n] to cu_seqlens[n + 1].

    The 128 keys that share a scale are counted from the beginning of their sequence. Keys of no sequence become 0.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim) and (total_k, kv_heads, v_dim).
        key_lengths: (sequences,).

    Returns:
        Three tensors of the shapes of q, k and v, and (total_q, heads).
    """
    q, k, v = (_finite_or_nan(t.to(torch.float32)) for t in (q, k, v))
    kv_heads, sequences = k.size(1), cu_seqlens_k.numel() - 1
    of_query, _ = _places(cu_seqlens_q, q.size(0))
    of_key, place = _places(cu_seqlens_k, k.size(0))
    lengths = cu_seqlens_k.diff()
    if key_lengths is not None:
        lengths = torch.minimum(lengths, key_lengths.to(lengths.dtype))
    lengths = torch.cat([lengths, lengths.new_zeros(1)])  # of rows in no sequence
    hidden = (place >= lengths[of_key])[:, None, None]
    k, v = (t.masked_fill(hidden, torch.nan) for t in (k, v))
    total = k.new_zeros(sequences + 1, *k.shape[1:]).index_add(0, of_key, k.nan_to_num(0.0))
    mean = _mean_of(total, lengths.clamp(min=1)[:, None, None])
    shift = (q * mean[of_query].repeat_interleave(q.size(1) // max(1, kv_heads), dim=1)).sum(-1)
    k = k - mean[of_key]
    # No two sequences have a block in common: see `_first_block` in fastattn.kernels._quantized.
    blocks = k.size(0) // _BLOCK + sequences + 1
    block = (cu_seqlens_k[of_key] // _BLOCK + of_key + place // _BLOCK).clamp(0, blocks - 1)[:, None]
    largest_k = k.new_zeros(blocks, kv_heads).scatter_reduce(
        0, block.expand(-1, kv_heads), _largest(k, 2)[..., 0], "amax"
    )
    largest_v = v.new_zeros(sequences + 1, *v.shape[1:]).scatter_reduce(
        0, of_key[:, None, None].expand_as(v), v.abs().nan_to_num(0.0), "amax"
    )
    k, v = _rounded(k, largest_k[block[:, 0], :, None]), _rounded(v, largest_v[of_key])
    return _rounded(q, _largest(q, 2)), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), shift


def _places(starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(sequence of each row, its place there); rows in no sequence are of one more, behind all."""
    index = torch.arange(rows, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts[1:].contiguous(), index, right=True)
    return sequence, index - starts[sequence]


def _mean_of(total: Tensor, count: int | Tensor) -> Tensor:
    mean = total / count
    return mean.masked_fill(mean.isinf(), 0.0)


def _finite_or_nan(x: Tensor) -> Tensor:
    return x.masked_fill(x.isinf(), torch.nan)


def _largest(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The largest absolute value along `dims`, which stay as 1; what is not finite aside, and 0 of nothing."""
    if x.numel() == 0:
        of_dims = (dims,) if isinstance(dims, int) else dims
        return x.new_zeros([1 if dim in of_dims else size for dim, size in enumerate(x.shape)])
    return x.abs().nan_to_num(0.0).amax(dims, keepdim=True)


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    """x rounded to e4m3 and back, with the scale that makes `largest` e4m3's largest."""
    scale = torch.where(largest < _LEAST, 1.0, largest * (1.0 / _LARGEST))
    whole = (x * (1.0 / scale)).clamp(-_LARGEST, _LARGEST)  # NaN stays
    return whole.to(torch.float8_e4m3fn).to(torch.float32) * scale
