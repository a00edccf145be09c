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
    count = k.size(2) if key_lengths is None else key_lengths.clamp(min=1)[:, None, None, None]
    hidden = None
    if key_lengths is not None:
        hidden = (torch.arange(k.size(2), device=k.device) >= key_lengths[:, None])[:, None, :, None]
        k, v = (t.masked_fill(hidden, torch.nan) for t in (k, v))
    mean = k.nansum(2, keepdim=True) / count
    mean = mean.masked_fill(mean.isinf(), 0.0)
    shift = q @ mean.repeat_interleave(q.size(1) // max(1, k.size(1)), dim=1).transpose(2, 3)
    blocks = torch.nn.functional.pad(k - mean, (0, 0, 0, -k.size(2) % _BLOCK), value=torch.nan)
    rounded_k = _rounded(blocks.unflatten(2, (-1, _BLOCK)), (3, 4)).flatten(2, 3)[:, :, : k.size(2)]
    q, k, v = _rounded(q, 3), rounded_k, _rounded(v, 2)
    if hidden is not None:
        k, v = (t.masked_fill(hidden, 0.0) for t in (k, v))
    return q, k, v, shift[..., 0]


def _finite_or_nan(x: Tensor) -> Tensor:
    return x.masked_fill(x.isinf(), torch.nan)


def _rounded(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """x with a scale for all elements along `dims`, rounded to e4m3 and back."""
    largest = x.abs().nan_to_num(0.0).amax(dims, keepdim=True)
    scale = torch.where(largest < _LEAST, 1.0, largest * (1.0 / _LARGEST))
    whole = (x * (1.0 / scale)).clamp(-_LARGEST, _LARGEST)  # NaN stays
    return whole.to(torch.float8_e4m3fn).to(torch.float32) * scale
