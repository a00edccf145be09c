"""The blocks in which PyTorch operators compute attention: where each lies, its scores, its dropout.

A call is cut into pieces, each an attention of its own: a few batches, or one of the packed sequences. A piece
is cut into blocks of query rows, each with the keys that any of its rows may see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.kernels._options import AttentionOptions

# Scores that exist at one time, in elements: 2 MiB in float32 on a CPU, where a core's second-level cache still holds
# most of them (measured on one core from 2^17 to 2^20), and 16 MiB on other devices, where launches cost more.
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS = 1 << 22
# Below this many rows a matrix product is slower per row, so that fewer batches make a piece instead.
_GOOD_ROWS = 64
# Even a very long row of keys still gives matrix products, not vector ones.
_MIN_ROWS = 16


class Piece(NamedTuple):
    """An attention of its own inside the call.

    Attributes:
        number: the first batch, or the sequence's number.
        shape: (batch, heads, seq_q) of its own queries.
        batch, rows, keys: where the piece lies in q, k and v; without the keys that no batch of it sees.
        entries: where it lies in the batch dimension of the options' tensors.
        k, v: (batch * kv_heads, keys, width) in float32 or wider; 0 at hidden keys.
        seq_k: the keys before those that no batch sees were left out, from which alignments count.
        hidden: (batch, 1, 1, keys), true at a batch's padding; None where there is none.
        seed: what dropout draws from.
        options: those of the whole call.
    """

    number: int
    shape: tuple[int, int, int]
    batch: slice
    rows: slice
    keys: slice
    entries: slice
    k: Tensor
    v: Tensor
    seq_k: int
    hidden: Tensor | None
    seed: Sequence[int]
    options: AttentionOptions

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of query rows, each with the keys that any of its rows may see, maybe none."""
        batch, heads, seq_q = self.shape
        if batch == 0 or heads == 0 or seq_q == 0:
            return
        width = _block_width(self.seq_k, self.options)
        step = max(_MIN_ROWS, _block_elements(self.k) // max(1, batch * heads * width))
        if width < self.seq_k:  # a window: the more rows, the more keys that most of them do not see
            step = min(step, max(_GOOD_ROWS, width // 4))
        step = -(-seq_q // -(-seq_q // step))  # blocks of equal length
        for start in range(0, seq_q, step):
            end = min(seq_q, start + step)
            yield slice(start, end), self._visible_keys(start, end)

    def place(self, rows: slice) -> tuple[slice, slice, slice]:
        """Where a block's rows lie in a tensor like the call's q."""
        start = self.rows.start
        return self.batch, slice(None), slice(start + rows.start, start + rows.stop)

    def by_key(self, rows: Tensor) -> Tensor:
        """(batch, heads, rows, d) as (batch * kv_heads, groups * rows, d), wide: the heads that share keys, stacked."""
        batch, heads, count, width = rows.shape
        kv_heads = self.k.size(0)
        return rows.reshape(kv_heads, batch * heads // kv_heads * count, width).to(self.k.dtype)

    def by_head(self, rows: Tensor) -> Tensor:
        """The inverse of `by_key` for a contiguous tensor; a view."""
        batch, heads, _ = self.shape
        return rows.view(batch, heads, rows.size(0) * rows.size(1) // (batch * heads), rows.size(2))

    def part(self, tensor: Tensor, rows: slice, keys: slice) -> Tensor:
        """The block of a tensor like bias or mask, of size 1 where that broadcasts."""
        places = (self.entries, slice(None), rows, keys)
        whole = slice(None)
        return tensor[tuple(whole if n == 1 else s for n, s in zip(tensor.shape, places, strict=True))]

    def scores(self, queries: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """The scores of a block, (batch, heads, rows, keys), and the derivative of their cap where there is one.

        Args:
            queries: rows of q, `by_key`.
        """
        softcap = self.options.softcap
        scale = self.options.scale / softcap if softcap else self.options.scale
        keys_t = self.k[:, keys].transpose(1, 2)
        scores = scaled_product(queries, keys_t, scale)
        slope = None
        if softcap:
            scores.tanh_()
            slope = self.by_head(torch.addcmul(scores.new_ones(1), scores, scores, value=-1))
            scores.mul_(softcap)
        return self._mask(self._add(self.by_head(scores), rows, keys), rows, keys), slope

    def keep(self, rows: slice, keys: slice) -> Tensor:
        """True where dropout keeps a weight of this block.

        Drawn for all keys, so that the same weights are kept whatever else hides keys.
        """
        batch, heads, _ = self.shape
        generator = torch.Generator(self.k.device)
        generator.manual_seed(_mix(*self.seed, self.number, rows.start))
        shape = (batch, heads, rows.stop - rows.start, self.seq_k)
        drawn = torch.empty(shape, dtype=torch.bool, device=self.k.device)
        return drawn.bernoulli_(1.0 - self.options.dropout_p, generator=generator)[..., keys]

    def _visible_keys(self, start: int, end: int) -> slice:
        """The keys that any of the rows from start to end may see."""
        left, right = self.options.left, self.options.right
        first, stop = 0, self.k.size(1)
        if left >= 0:
            first = min(stop, max(0, start + self._offset - left))
        if right >= 0:
            stop = max(first, min(stop, end + self._offset + right))
        return slice(first, stop)

    @property
    def _offset(self) -> int:
        """Row i's own place among the keys is i + offset."""
        return self.seq_k - self.shape[2] if self.options.bottom_right else 0

    def _add(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        """Bias and ALiBi, in place."""
        bias, slopes = self.options.bias, self.options.alibi_slopes
        if bias is not None:
            scores += self.part(bias, rows, keys)
        if slopes is not None:
            row, key = _places(rows, scores), _places(keys, scores)
            distance = (row.unsqueeze(1) + (self.seq_k - self.shape[2]) - key).abs_().to(scores.dtype)
            slopes = slopes if slopes.size(0) == 1 else slopes[self.entries]
            scores.addcmul_(slopes[:, :, None, None].to(scores.dtype), distance, value=-1)
        return scores

    def _mask(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        """-inf at hidden keys, in place. Last, so that nothing found at a hidden key stays."""
        if self.options.mask is not None:
            scores.masked_fill_(~self.part(self.options.mask, rows, keys), -math.inf)
        if self.hidden is not None:
            scores.masked_fill_(self.hidden[..., keys], -math.inf)
        left, right = self.options.left, self.options.right
        if left >= 0 or right >= 0:
            own = (_places(rows, scores) + self._offset).unsqueeze(1)
        # Only the last keys of the block are hidden from its first rows, and the first keys from its last rows.
        if right >= 0:
            seen = max(keys.start, rows.start + self._offset + right + 1)
            if seen < keys.stop:
                later = _places(slice(seen, keys.stop), scores) > own + right
                scores[..., seen - keys.start :].masked_fill_(later, -math.inf)
        if left >= 0:
            seen = min(keys.stop, rows.stop - 1 + self._offset - left)
            if seen > keys.start:
                earlier = _places(slice(keys.start, seen), scores) < own - left
                scores[..., : seen - keys.start].masked_fill_(earlier, -math.inf)
        return scores


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b; inside the product the scale costs nothing. With beta=0 the first operand is not read."""
    return torch.bmm(a, b) if scale == 1.0 else torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def pieces(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Iterator[Piece]:
    """The attentions that a call consists of. The pieces of a call depend on its shapes alone."""
    key_lengths = options.key_lengths
    lengths = None if key_lengths is None else key_lengths.tolist()
    seed = () if options.dropout_seed is None else options.dropout_seed.tolist()
    for number, batch, entries, rows, keys in _places_of_pieces(q, k, options):
        seq_k = keys.stop - keys.start
        hidden = None
        if key_lengths is not None and lengths is not None:
            longest = max(0, min(seq_k, max(lengths[entries])))
            keys = slice(keys.start, keys.start + longest)
            if min(lengths[entries]) < longest:
                hidden = torch.arange(longest, device=q.device) >= key_lengths[entries].unsqueeze(1)
        yield Piece(
            number=number,
            shape=(batch.stop - batch.start, q.size(1), rows.stop - rows.start),
            batch=batch,
            rows=rows,
            keys=keys,
            entries=entries,
            k=_wide_keys(k[batch, :, keys], hidden),
            v=_wide_keys(v[batch, :, keys], hidden),
            seq_k=seq_k,
            hidden=None if hidden is None else hidden[:, None, None],
            seed=seed,
            options=options,
        )


def _places_of_pieces(
    q: Tensor, k: Tensor, options: AttentionOptions
) -> Iterator[tuple[int, slice, slice, slice, slice]]:
    """For each piece its number, and where it lies: batches, entries of the options' tensors, rows, keys."""
    batch, heads, seq_q, _ = q.shape
    if batch == 0 or heads == 0:
        return
    if options.cu_seqlens_q is not None and options.cu_seqlens_k is not None:
        all_rows = _sequences(options.cu_seqlens_q, seq_q)
        all_keys = _sequences(options.cu_seqlens_k, k.size(2))
        for n, (rows, keys) in enumerate(zip(all_rows, all_keys, strict=False)):
            yield n, slice(0, 1), slice(n, n + 1), rows, keys
        return
    elements = heads * min(max(1, seq_q), _GOOD_ROWS) * _block_width(k.size(2), options)
    step = max(1, _block_elements(q) // max(1, elements))
    for start in range(0, batch, step):
        some = slice(start, min(batch, start + step))
        yield start, some, some, slice(0, seq_q), slice(0, k.size(2))


def _sequences(cu_seqlens: Tensor, total: int) -> list[slice]:
    """The places of the sequences; offsets that go backwards or past the end make shorter ones."""
    offsets: list[int] = []
    for offset in cu_seqlens.tolist():
        offsets.append(max(offsets[-1] if offsets else 0, min(total, offset)))
    return [slice(start, end) for start, end in pairwise(offsets)]


def _wide_keys(keys: Tensor, hidden: Tensor | None) -> Tensor:
    """(batch, kv_heads, seq_k, d) as (batch * kv_heads, seq_k, d) in float32 or wider, 0 where hidden.

    What lies at a hidden key has weight 0, but 0 * NaN would be NaN.
    """
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if hidden is not None:
        wide = wide.masked_fill(hidden[:, None, :, None], 0.0)
    return wide.reshape(keys.size(0) * keys.size(1), *keys.shape[2:])


def _block_elements(like: Tensor) -> int:
    return _BLOCK_ELEMENTS_CPU if like.device.type == "cpu" else _BLOCK_ELEMENTS


def _block_width(seq_k: int, options: AttentionOptions) -> int:
    """Keys that a block holds at most; where dropout is drawn, all of them."""
    if options.dropout_p or options.left < 0 or options.right < 0:
        return seq_k
    return min(seq_k, options.left + options.right + _GOOD_ROWS)


def _places(where: slice, like: Tensor) -> Tensor:
    return torch.arange(where.start, where.stop, device=like.device)


def _mix(*parts: int) -> int:
    """64 bits, each of which depends on every part (the finalizer of SplitMix64; Steele et al., 2014).

    PyTorch's generator on the CPU starts from the lower 32 bits alone.
    """
    mixed = 0
    for part in parts:
        mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed
