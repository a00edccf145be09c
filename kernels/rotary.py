"""Rotary position embeddings: one kernel for both directions, both pairings, in place or not, one tensor or two."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Rows
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_rows, rows_contiguous
from fastattn.kernels._plan import Constants, planned
from fastattn.kernels._rotary_config import heads_of_program, select_rotary_config
from fastattn.kernels._target import Target


class Places(NamedTuple):
    """What gives a row its position; None for what is not given.

    `positions` (batch, seq); `starts` (batch,); `bounds` (sequences + 1,), where packed sequences lie.
    """

    positions: Any
    stride_b: Any
    stride_m: Any
    starts: Any
    bounds: Any


# Strides are given in units of up to so many elements: of an argument Triton knows whether 16 divides it and nothing
# else, and a 16-byte access to heads of 40 or 72 features needs to know that 8 does.
_MAX_UNIT = 8


@triton.jit
def _rotate(x1, x2, cos, sin):
    """(x1 + i x2) (cos + i sin): Su et al., equation 34."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _sequence_of(bounds, rows, SEQUENCES):
    """The last n with bounds[n] <= row, by bisection; reads nothing but bounds[0] to bounds[SEQUENCES]."""
    found = tl.zeros_like(rows)
    step = 1
    while step * 2 <= SEQUENCES:
        step *= 2
    while step > 0:
        higher = found + step
        bound = tl.load(bounds + higher, mask=higher <= SEQUENCES, other=0)
        found = tl.where((higher <= SEQUENCES) & (bound <= rows), higher, found)
        step = step // 2
    return found


@triton.jit
def _position_of(places, batch, rows, inside, START, SEQUENCES):
    """The positions of rows, and which rows a sequence covers. (BLOCK_M,) each."""
    covered = inside
    if places.positions is not None:
        pointers = places.positions + batch * places.stride_b + rows * places.stride_m
        position = tl.load(pointers, mask=inside, other=0).to(tl.int64)
    elif places.bounds is not None:
        sequence = _sequence_of(places.bounds, rows, SEQUENCES)
        covered = inside & (sequence < SEQUENCES)
        position = rows - tl.load(places.bounds + sequence) + START
        if places.starts is not None:
            position += tl.load(places.starts + sequence, mask=covered, other=0)
    else:
        position = rows + START
        if places.starts is not None:
            position += tl.load(places.starts + batch)
    return position, covered


@triton.jit
def _rotate_heads(
    x,
    y,
    batch,
    first,
    last,
    rows,
    inside,
    covered,
    cos,
    sin,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SOME_UNCOVERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates a tile of rows of the heads from first to last, all by the same angles. Rows not covered stay."""
    narrow = y.ptr.dtype.element_ty
    pairs = tl.arange(0, BLOCK_D)
    inside_pairs = inside[:, None] & (pairs < PAIRS)[None, :]  # rows and pairs overrun
    x_rows = x.ptr + (batch * x.stride_b + rows[:, None] * x.stride_m) * UNIT
    y_rows = y.ptr + (batch * y.stride_b + rows[:, None] * y.stride_m) * UNIT
    for head in range(first, last):
        x_head = x_rows + tl.cast(head, tl.int64) * x.stride_h * UNIT
        y_head = y_rows + tl.cast(head, tl.int64) * y.stride_h * UNIT
        if INTERLEAVED:
            columns = tl.arange(0, 2 * BLOCK_D)
            inside_columns = inside[:, None] & (columns < 2 * PAIRS)[None, :]
            both = tl.load(x_head + columns[None, :], mask=inside_columns, other=0.0)
            x1, x2 = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_D, 2)))
        else:
            x1 = tl.load(x_head + pairs[None, :], mask=inside_pairs, other=0.0)  # (BLOCK_M, BLOCK_D)
            x2 = tl.load(x_head + PAIRS + pairs[None, :], mask=inside_pairs, other=0.0)
        y1, y2 = _rotate(x1.to(tl.float32), x2.to(tl.float32), cos, sin)
        y1, y2 = y1.to(narrow), y2.to(narrow)
        if SOME_UNCOVERED:
            y1, y2 = tl.where(covered[:, None], y1, x1), tl.where(covered[:, None], y2, x2)
        if INTERLEAVED:
            both = tl.reshape(tl.join(y1, y2), (BLOCK_M, 2 * BLOCK_D))
            tl.store(y_head + columns[None, :], both, mask=inside_columns)
        else:
            tl.store(y_head + pairs[None, :], y1, mask=inside_pairs)
            tl.store(y_head + PAIRS + pairs[None, :], y2, mask=inside_pairs)
        if BLOCK_REST > 0:
            rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)
            inside_rest = inside[:, None] & (rest < HEAD_DIM)[None, :]
            passed = tl.load(x_head + rest[None, :], mask=inside_rest, other=0.0)
            tl.store(y_head + rest[None, :], passed, mask=inside_rest)


@triton.jit(do_not_specialize=["SEQ", "POSITIONS", "START", "SEQUENCES", "HEADS", "OTHER_HEADS", "GROUP"])
def _rotary_kernel(
    x,
    other_x,
    y,
    other_y,
    cos_ptr,
    sin_ptr,
    places,
    SEQ,
    POSITIONS,
    START,
    SEQUENCES,
    HEADS,
    OTHER_HEADS,
    GROUP,
    UNIT: tl.constexpr,
    STRIDE_COS: tl.constexpr,
    STRIDE_SIN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program rotates BLOCK_M positions of up to GROUP heads of one batch and of one of the two tensors.

    Grid: batch * cdiv(SEQ, BLOCK_M) * (cdiv(HEADS, GROUP) + cdiv(OTHER_HEADS, GROUP)), heads fastest. The last
    dimensions are contiguous; x and y may be one tensor: an element is read and written by one program alone.
    """
    groups = tl.cdiv(HEADS, GROUP)
    all_groups = groups + tl.cdiv(OTHER_HEADS, GROUP)
    program = tl.program_id(0)
    group = program % all_groups
    tiles = tl.cdiv(SEQ, BLOCK_M)
    tile = program // all_groups % tiles
    batch = (program // all_groups // tiles).to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    inside = rows < SEQ  # the last tile overruns

    position, covered = _position_of(places, batch, rows, inside, START, SEQUENCES)
    pairs = tl.arange(0, BLOCK_D)
    # A position without a row in the tables gives NaN: neither memory beyond them nor another position's angle.
    known = (inside & (position >= 0) & (position < POSITIONS))[:, None] & (pairs < PAIRS)[None, :]
    nan = float("nan")
    cos = tl.load(cos_ptr + position[:, None] * STRIDE_COS + pairs[None, :], mask=known, other=nan)
    sin = tl.load(sin_ptr + position[:, None] * STRIDE_SIN + pairs[None, :], mask=known, other=nan)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)  # (BLOCK_M, BLOCK_D)
    if CONJUGATE:
        sin = -sin

    if group < groups:
        first = group * GROUP
        _rotate_heads(
            x, y, batch, first, min(first + GROUP, HEADS), rows, inside, covered, cos, sin,
            UNIT, HEAD_DIM, PAIRS, INTERLEAVED, places.bounds is not None, BLOCK_M, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
    elif other_x is not None:
        first = (group - groups) * GROUP
        _rotate_heads(
            other_x, other_y, batch, first, min(first + GROUP, OTHER_HEADS), rows, inside, covered, cos, sin,
            UNIT, HEAD_DIM, PAIRS, INTERLEAVED, places.bounds is not None, BLOCK_M, BLOCK_D, BLOCK_REST,
        )  # fmt: skip


def rotary_embedding(
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
    """One or two tensors (batch, heads, seq, head_dim) or (total, heads, head_dim), rotated by their positions' angles.

    Args:
        tensors: of one dtype, and of one shape but for their heads.
        cos, sin: (positions, pairs) of one dtype; pair i is rotated by the angle of column i.
        positions: (batch, seq), (seq,) or (total,), or None for those that begin with `start`, plus `starts`
            (batch,) or (sequences,), plus 0 in each batch or at each of `cu_seqlens` (sequences + 1,).
        conjugate: rotates by the negative angles.

    Returns:
        The results, in the tensors' strides where these have neither holes nor overlaps.
    """
    given = [rows_contiguous(x) for x in tensors]
    results = [empty_rows(x) for x in tensors]
    _launch(given, results, cos, sin, positions, starts, cu_seqlens, start, interleaved, conjugate)
    return results


def rotary_embedding_in_place(
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
    """`rotary_embedding` that writes over the tensors; one whose rows a kernel cannot read is copied, and back."""
    given = [rows_contiguous(x) for x in tensors]
    _launch(given, given, cos, sin, positions, starts, cu_seqlens, start, interleaved, conjugate)
    for x, rows in zip(tensors, given, strict=True):
        if rows is not x:
            x.copy_(rows)


def _launch(
    given: Sequence[Tensor],
    results: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    start: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    cos, sin = rows_contiguous(cos), rows_contiguous(sin)
    tensors = (*given, *results)
    plan = _plan(
        tuple([x.shape for x in given]),
        tuple([t.stride() for t in tensors]),
        cos.size(1),
        given[0] is results[0],
        given[0].dtype,
        _target.target_of(cos.device),
    )
    if plan is None:
        return
    rows = [Rows(t, *strides) for t, strides in zip(tensors, plan.strides, strict=True)]
    x, other_x, y, other_y = rows if len(rows) == 4 else (rows[0], None, rows[1], None)
    with _target.launching_on(cos):
        launch(
            _rotary_kernel,
            plan.grid,
            plan.constants,
            x=x,
            other_x=other_x,
            y=y,
            other_y=other_y,
            cos_ptr=cos,
            sin_ptr=sin,
            places=_places(positions, starts, cu_seqlens),
            POSITIONS=cos.size(0),
            START=start,
            SEQUENCES=0 if cu_seqlens is None else cu_seqlens.numel() - 1,
            STRIDE_COS=cos.stride(0),
            STRIDE_SIN=sin.stride(0),
            INTERLEAVED=interleaved,
            CONJUGATE=conjugate,
        )


class _Plan(NamedTuple):
    """The launch on tensors of these shapes and strides: strides of batch, head and position in units of UNIT."""

    strides: tuple[tuple[int, int, int], ...]
    grid: tuple[int]
    constants: Constants


@planned
def _plan(
    shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...],
    pairs: int,
    in_place: bool,
    dtype: torch.dtype,
    target: Target,
) -> _Plan | None:
    """The plan for one or two tensors, of whose results are the other strides; None where there is no element."""
    if all(0 in shape for shape in shapes):
        return None
    if len(shapes[0]) == 3:  # packed: (total, heads, head_dim) is one batch
        batch, (seq, _, head_dim) = 1, shapes[0]
        heads = [shape[1] for shape in shapes]
        distances = [(0, head, row) for row, head, _ in strides]
    else:
        batch, _, seq, head_dim = shapes[0]
        heads = [shape[1] for shape in shapes]
        distances = [(first, head, row) for first, head, row, _ in strides]
    config = select_rotary_config(pairs, 0 if in_place else head_dim - 2 * pairs, dtype, target)
    tiles = batch * ceil_div(seq, config.block_m)
    group = heads_of_program(heads, tiles, config.programs)
    unit = gcd(_MAX_UNIT, *(distance for of in distances for distance in of))
    constants = Constants(
        SEQ=seq,
        HEADS=heads[0],
        OTHER_HEADS=heads[1] if len(heads) == 2 else 0,
        GROUP=group,
        UNIT=unit,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        BLOCK_REST=config.block_rest,
        num_warps=config.num_warps,
    )
    grid = (tiles * sum(ceil_div(count, group) for count in heads),)
    return _Plan(tuple((b // unit, h // unit, m // unit) for b, h, m in distances), grid, constants)


def _places(positions: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None) -> Places:
    stride_b = stride_m = None
    if positions is not None:
        stride_b = positions.stride(0) if positions.dim() == 2 and positions.size(0) > 1 else 0
        stride_m = positions.stride(-1)
    return Places(
        positions,
        stride_b,
        stride_m,
        None if starts is None else starts.contiguous(),
        None if positions is not None or cu_seqlens is None else cu_seqlens.contiguous(),
    )
