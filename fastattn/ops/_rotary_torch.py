"""Rotary position embeddings by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.dispatch import checking
from fastattn.kernels._layout import empty_rows

# Elements rotated at a time: with their float32 copies about 2 MiB, so that what the next operator reads is still in
# a cache. On a Xeon with 2 MiB of L2, bfloat16 (4, 32, 1024, 128) took 71 ms so and 129 ms whole.
_PIECE = 1 << 17


def rotate_by_operators(
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
    interleaved: bool,
    conjugate: bool,
) -> list[Tensor]:
    """What `fastattn.kernels.rotary.rotary_embedding` computes. Autograd cannot look into it."""
    call = (cos, sin, positions, starts, cu_seqlens, start, interleaved, conjugate)
    results = [empty_rows(x) for x in tensors]
    for x, y in zip(tensors, results, strict=True):
        _rotate_pieces(x, y, *call)
    return results


def rotate_by_operators_in_place(
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """`rotate_by_operators` that writes over the tensors."""
    for x in tensors:
        _rotate_pieces(x, x, cos, sin, positions, starts, cu_seqlens, start, interleaved, conjugate)


def rotate_differentiably(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """The same from operators that autograd, transforms and the compiler see through, with gradients of cos and sin."""
    packed, given = x.dim() == 3, x
    if packed:
        x = x.transpose(0, 1).unsqueeze(0)
    cos, sin, covered = _angles(x, cos, sin, positions, starts, cu_seqlens, start)
    if conjugate:
        sin = -sin
    wide = _wide(x)
    x1, x2 = _pairs(x[..., : 2 * cos.size(-1)], interleaved)
    x1, x2 = x1.to(wide), x2.to(wide)
    parts = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    y = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    y = y.to(x.dtype)
    if y.size(-1) < x.size(-1):
        y = torch.cat((y, x[..., y.size(-1) :]), dim=-1)
    if covered is not None:
        y = torch.where(covered, y, x)
    if packed:
        y = y[0].transpose(0, 1)
    return y.reshape(given.shape)


def _rotate_pieces(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes x, rotated, over y, which may be x."""
    in_place = x is y
    if x.dim() == 3:
        x, y = x.transpose(0, 1).unsqueeze(0), y.transpose(0, 1).unsqueeze(0)
    if x.numel() == 0:
        return
    cos, sin, covered = _angles(x, cos, sin, positions, starts, cu_seqlens, start)
    turned = 2 * cos.size(-1)
    if turned < x.size(-1):
        if not in_place:
            y[..., turned:].copy_(x[..., turned:])
        x, y = x[..., :turned], y[..., :turned]
    if x.numel() <= _PIECE:
        # Not sliced: for a row or two that takes longer than to rotate them.
        _rotate_piece(x, y, cos, sin, covered, interleaved, conjugate, in_place)
        return
    for batches, heads, rows in _pieces(x):
        if cos.dim() == 2:
            cos_piece, sin_piece = cos[rows], sin[rows]
        else:
            of_piece = (batches if cos.size(0) > 1 else slice(None), heads, rows)
            cos_piece, sin_piece = cos[of_piece], sin[of_piece]
        piece = (batches, heads, rows)
        of_rows = None if covered is None else covered[rows]
        _rotate_piece(x[piece], y[piece], cos_piece, sin_piece, of_rows, interleaved, conjugate, in_place)


def _rotate_piece(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    covered: Tensor | None,
    interleaved: bool,
    conjugate: bool,
    in_place: bool,
) -> None:
    wide = x if x.dtype == cos.dtype else x.to(cos.dtype)
    result = y
    if in_place or wide.dtype != y.dtype or (interleaved and not _is_complex(y)):
        result = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (_rotate_interleaved if interleaved else _rotate_halves)(wide, cos, sin, result, conjugate)
    if covered is not None:
        result = torch.where(covered, result, x)
    if result is not y:
        y.copy_(result)


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    batch, heads, seq, head_dim = x.shape
    batches = max(1, _PIECE // (heads * seq * head_dim))
    rows = max(1, _PIECE // (heads * head_dim))
    if batches > 1 or rows >= seq:
        rows = seq
    for first in range(0, batch, batches):
        for row in range(0, seq, rows):
            yield slice(first, first + batches), slice(None), slice(row, row + rows)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, conjugate: bool) -> None:
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    sign = -1 if conjugate else 1
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin, value=sign)


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, conjugate: bool) -> None:
    x = x if _is_complex(x) else x.contiguous()
    torch.mul(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))),
        torch.complex(cos, -sin if conjugate else sin),
        out=torch.view_as_complex(y.unflatten(-1, (-1, 2))),
    )


def _is_complex(pairs: Tensor) -> bool:
    """Whether neighbouring features can be viewed as complex numbers."""
    even = all(stride % 2 == 0 for stride in pairs.stride()[:-1])
    return pairs.stride(-1) == 1 and even and pairs.storage_offset() % 2 == 0


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def _angles(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin of x's rows, and which rows (seq, 1) a sequence covers, None for all.

    They are (seq, pairs) or (batch or 1, 1, seq, pairs), in the dtype that is computed in.
    """
    seq, covered = x.size(2), None
    given = positions if positions is not None else cu_seqlens if cu_seqlens is not None else starts
    if given is None:
        if seq != cos.size(0):  # else start is 0
            cos, sin = cos[start : start + seq], sin[start : start + seq]
    else:
        rows = torch.arange(seq, device=x.device)
        if positions is None and cu_seqlens is not None:
            positions, covered = _places_in_sequences(rows, cu_seqlens, starts, start)
        elif positions is None and starts is not None:
            positions = rows + starts.unsqueeze(1) + start
        assert positions is not None
        cos, sin = _rows_of_tables((cos, sin), positions, known=checking(given))
    # float64 tables of a float64 x alone; others are computed with in float32.
    wide = _wide(x)
    if cos.dtype != wide:
        cos, sin = cos.to(wide), sin.to(wide)
    if cos.dim() == 2:
        return cos, sin, covered
    return cos.unsqueeze(1), sin.unsqueeze(1), covered


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype


def _rows_of_tables(tables: tuple[Tensor, Tensor], positions: Tensor, known: bool) -> tuple[Tensor, Tensor]:
    """Rows of both; NaN where a position is not known to lie, and does not lie, within them."""
    cos, sin = tables
    if known:
        return cos[positions], sin[positions]
    last = cos.size(0) - 1
    outside = ((positions < 0) | (positions > last)).unsqueeze(-1)
    within = positions.clamp(0, last)
    return cos[within].masked_fill(outside, torch.nan), sin[within].masked_fill(outside, torch.nan)


def _places_in_sequences(
    rows: Tensor, cu_seqlens: Tensor, starts: Tensor | None, start: int
) -> tuple[Tensor, Tensor | None]:
    """Each row's position, 0 for a row of no sequence, and which rows are of one, None for all."""
    sequences, total = cu_seqlens.numel() - 1, rows.numel()
    cu_seqlens = cu_seqlens.to(rows.dtype)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    covered = sequence < sequences
    positions = rows - cu_seqlens[sequence.clamp(0, sequences)] + start
    if starts is not None:
        # One more, for rows of no sequence.
        positions = positions + torch.nn.functional.pad(starts, (0, 1))[sequence.clamp(0, sequences)]
    if checking(cu_seqlens) and int(cu_seqlens[-1]) == total:
        return positions, None
    return positions * covered, covered.unsqueeze(1)
