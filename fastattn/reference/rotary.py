"""Rotary position embeddings by their formula."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Each pair of features of x, a complex number, times cos + i sin of its position; see `fastattn.rotary_embedding`.

    Computed in float32 where x is narrower, as every implementation does.
    """
    if x.dim() == 3:
        rows = torch.arange(x.size(0), device=x.device)
        covered = None
        if positions is None and cu_seqlens is not None:
            positions = _within_sequences(rows, offsets, cu_seqlens)
            covered = (rows < cu_seqlens[-1])[:, None, None]
        turned = rotary_embedding(
            x.transpose(0, 1)[None], cos, sin, interleaved=interleaved, positions=positions
        )[0].transpose(0, 1)
        return turned if covered is None else torch.where(covered, turned, x)
    if positions is None:
        start = offsets.unsqueeze(1) if isinstance(offsets, Tensor) else offsets
        positions = torch.arange(x.size(2), device=x.device) + start
    wide = torch.promote_types(x.dtype, torch.float32)
    outside = ((positions < 0) | (positions >= cos.size(0))).unsqueeze(-1)
    within = positions.clamp(0, max(0, cos.size(0) - 1))
    # (batch or none, 1, seq, pairs), NaN where a position lies outside the tables.
    cos, sin = (t[within].to(wide).masked_fill(outside, torch.nan).unsqueeze(-3) for t in (cos, sin))
    pairs = cos.size(-1)
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        real, imaginary = turning[..., ::2], turning[..., 1::2]
    else:
        real, imaginary = turning[..., :pairs], turning[..., pairs:]
    product = torch.complex(real.to(wide), imaginary.to(wide)) * torch.complex(cos, sin)
    parts = (product.real, product.imag)
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _within_sequences(rows: Tensor, offsets: int | Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each row's position in its sequence; 0 for rows of none."""
    positions = torch.zeros_like(rows)
    bounds = cu_seqlens.tolist()
    for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
        start = offsets[sequence] if isinstance(offsets, Tensor) else offsets
        positions[first:last] = rows[: last - first] + start
    return positions
