"""Attention's split keys put together: each split's accumulator, maximum and sum become out and lse.

Flash-decoding's second step (Dao et al., 2023). The splits hold what the forward's own loop holds between two tiles,
so that the weights are taken from differences of maxima: the log-sum-exp of a split would round off what large scores
have behind the point.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import _in_elements, rows_of, sequences_of
from fastattn.kernels._attention_decode_config import CombineTiles
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import block_d
from fastattn.kernels._math import LN_2, LOG2_E
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._plan import constants_of
from fastattn.kernels._tiles import _sequence, _split_program


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q", "MAX_SEQ_Q", "SPLITS"])
def _attention_combine_kernel(
    parts,
    out,
    lse_ptr,
    statistics_ptr,
    sequences,
    sinks_ptr,
    HEADS,
    SEQ_Q,
    MAX_SEQ_Q,
    SPLITS,
    V_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program computes a row of out and its lse.

    Grid (MAX_SEQ_Q * HEADS * sequences,). parts (batch * SPLITS, HEADS, SEQ_Q, V_DIM) and out (batch, HEADS, SEQ_Q,
    V_DIM) are `Rows`, statistics (batch * SPLITS, 2, HEADS, SEQ_Q) and lse (batch, HEADS, SEQ_Q) contiguous.
    """
    parts, out = _in_elements(parts), _in_elements(out)
    row, batch, head = _split_program(MAX_SEQ_Q, HEADS)
    held, start, rows = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    if row >= rows:
        return
    row += start
    columns = tl.arange(0, BLOCK_V)
    splits = tl.arange(0, BLOCK_S)
    of_split = tl.cast(HEADS, tl.int64) * SEQ_Q  # numbers of one kind in statistics
    statistics_ptr += held * SPLITS * 2 * of_split + head * SEQ_Q + row
    parts_ptr = parts.ptr + held * SPLITS * parts.stride_b + head * parts.stride_h + row * parts.stride_m

    # A sink is one more key whose value is 0: a split with its score as the maximum and a sum of 1.
    top = float("-inf")
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    sink = top
    for first in range(0, SPLITS, BLOCK_S):
        place = statistics_ptr + (first + splits) * 2 * of_split
        top = tl.maximum(top, tl.max(tl.load(place, mask=first + splits < SPLITS, other=float("-inf")), 0))
    # As in the forward: splits that saw no key, and a row that saw none at all, weigh 0 and not NaN.
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = pivot * 0.0
    if sinks_ptr is not None:
        total = tl.exp2(sink - pivot)
    result = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        inside = first + splits < SPLITS
        place = statistics_ptr + (first + splits) * 2 * of_split
        weights = tl.exp2(tl.load(place, mask=inside, other=float("-inf")) - pivot)  # (BLOCK_S,)
        total += tl.sum(weights * tl.load(place + of_split, mask=inside, other=0.0), 0)
        pointers = parts_ptr + ((first + splits).to(tl.int64) * parts.stride_b)[:, None] + columns[None, :]
        part = tl.load(pointers, mask=inside[:, None] & (columns < V_DIM)[None, :], other=0.0)
        result += tl.sum(part * weights[:, None], 0)

    result = result / tl.where(total == 0.0, 1.0, total)
    out_ptr = out.ptr + held * out.stride_b + head * out.stride_h + row * out.stride_m
    tl.store(out_ptr + columns, result.to(out.ptr.dtype.element_ty), mask=columns < V_DIM)
    lse = tl.where(total == 0.0, float("-inf"), (pivot + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + (held * HEADS + head) * SEQ_Q + row, lse)


def empty_parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits of this output go: accumulators, and the maxima and sums of their rows; both float32."""
    batch, heads, seq_q, v_dim = out.shape
    parts = torch.empty((batch * splits, heads, seq_q, v_dim), device=out.device, dtype=torch.float32)
    statistics = torch.empty((batch * splits, 2, heads, seq_q), device=out.device, dtype=torch.float32)
    return parts, statistics


def attention_combine(
    parts: Tensor,
    statistics: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    asked: AttentionOptions,
    tiles: CombineTiles,
) -> None:
    """Writes out and lse from what the forward's splits left in `empty_parts`.

    The splits are added up in their order, those of a tile in a tree: the same bits from run to run.
    """
    batch, heads, seq_q, v_dim = out.shape
    longest = asked.longest_q(seq_q)
    constants = constants_of(
        _target.target_of(out.device), HEADS=heads, SEQ_Q=seq_q, MAX_SEQ_Q=longest, SPLITS=parts.size(0) // batch,
        V_DIM=v_dim, BLOCK_S=tiles.block_s, BLOCK_V=block_d(v_dim), num_warps=tiles.num_warps,
    )  # fmt: skip
    launch(
        _attention_combine_kernel,
        (longest * heads * asked.sequences(batch),),
        constants,
        parts=rows_of(parts),
        out=rows_of(out),
        lse_ptr=lse,
        statistics_ptr=statistics,
        sequences=sequences_of(asked),
        sinks_ptr=sinks,
    )
