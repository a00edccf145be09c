"""Attention, backward for the queries: dQ = scale * dS K, a tile of queries a program (see attention_backward)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels._arguments import Score, _in_elements, read_rows, rows_of, sequences_of
from fastattn.kernels._attention_plan import AttentionLaunch
from fastattn.kernels._launch import launch
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._parts import (
    _add_product,
    _load_own_parts,
    _load_parts,
    _products_of_rows,
    _scaled,
    _store_parts,
    _zero_parts,
)
from fastattn.kernels._scores import _dropped, _scores_of, _slope_of
from fastattn.kernels._tiles import (
    _key_schedule,
    _key_window,
    _load_log2_sum,
    _rows_at,
    _sequence,
    _split_program,
    _stretch,
    _visible,
)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    dout,
    lse_log2,
    delta,
    k_rows,
    v_rows,
    score,
    slope,
    batch,
    head,
    HEADS,
    first_row,
    begin,
    end,
    SEQ_Q,
    SEQ_K,
    OFFSET,
    LOW,
    HIGH,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    """Adds dS K of keys begin .. end, BLOCK_N at a time, to dq (BLOCK_M, BLOCK_D)."""
    ENDS: tl.constexpr = "rows" if ONE_LOOP else "none"
    rows = tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1), within the tile, as keys are
    keys = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    for first_key in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZED):
        k = _load_parts(k_rows, first_key, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        v = _load_parts(v_rows, first_key, SEQ_K, V_DIM, BLOCK_N, BLOCK_V, MAY_OVERRUN=MASKED)
        products = _products_of_rows(q, k)  # (BLOCK_M, BLOCK_N)
        scores, cap_slope = _scores_of(
            products, score, slope, batch, head, first_row, first_key, rows, keys, SEQ_Q, OFFSET
        )
        weights = tl.exp2(scores - lse_log2[:, None])
        if MASKED:
            visible = _visible(first_row, first_key, rows, keys, SEQ_K, LOW, HIGH, HAS_LEFT, HAS_RIGHT, ENDS)
            weights = tl.where(visible, weights, 0.0)
        dweights = _products_of_rows(dout, v)  # (BLOCK_M, BLOCK_N)
        dweights = _dropped(dweights, score.dropout, batch, head, HEADS, first_row, first_key, rows, keys)
        dscores = weights * (dweights - delta[:, None])
        if score.softcap is not None:
            dscores = dscores * cap_slope
        dq = _add_product(dq, dscores.to(k[0].dtype), k)
    return dq


@triton.jit(
    do_not_specialize=[
        "HEADS",
        "SEQ_Q",
        "SEQ_K",
        "MAX_SEQ_Q",
        "MAX_SEQ_K",
        "LEFT",
        "RIGHT",
        "HEADS_TOGETHER",
        "HEADS_ABSENT",
    ]
)
def _attention_dq_kernel(
    q,
    k,
    v,
    dout,
    dq,
    lse_ptr,
    delta_ptr,
    score,
    sequences,
    scale,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    MAX_SEQ_Q,
    MAX_SEQ_K,
    LEFT,
    RIGHT,
    HEADS_TOGETHER,
    HEADS_ABSENT,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    """One program computes BLOCK_M rows of dq of one head of one sequence, over all keys they see.

    Grid (cdiv(MAX_SEQ_Q, BLOCK_M) * HEADS * sequences,), last tile of a head first. The tensors are `Rows`; lse and
    delta are (batch, HEADS, SEQ_Q), contiguous; SEQ_Q and SEQ_K are the tensors'.
    """
    q, k, v, dout, dq = (
        _in_elements(q),
        _in_elements(k),
        _in_elements(v),
        _in_elements(dout),
        _in_elements(dq),
    )
    tile, batch, head = _split_program(tl.cdiv(MAX_SEQ_Q, BLOCK_M), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    kv_head = head // GROUPS
    held, start_q, rows_q = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    _held, start_k, rows_k = _sequence(batch, sequences.starts_k, SEQ_K, MAX_SEQ_K)
    seq_k, offset, low, high = _key_window(
        batch, sequences.key_lengths, rows_q, rows_k, LEFT, RIGHT, BOTTOM_RIGHT
    )
    first_row = (tl.cdiv(rows_q, BLOCK_M) - 1 - tile) * BLOCK_M
    # Only packed rows return here, but the compiler computes with the sign it learns. Before a specialized loop, which
    # has no packed rows, it takes no return.
    if not SPECIALIZED:
        if first_row < 0:
            return
    q_ptr = q.ptr + held * q.stride_b + head * q.stride_h + start_q * q.stride_m
    k_rows = _rows_at(k, held, kv_head, start_k)
    v_rows = _rows_at(v, held, kv_head, start_k)
    dout_ptr = dout.ptr + held * dout.stride_b + head * dout.stride_h + start_q * dout.stride_m
    dq_ptr = dq.ptr + held * dq.stride_b + head * dq.stride_h + start_q * dq.stride_m
    statistics = (held * HEADS + head) * SEQ_Q + start_q

    query = _load_own_parts(q_ptr, first_row, q.stride_m, rows_q, HEAD_DIM, BLOCK_M, BLOCK_D, SPECIALIZED)
    grad = _load_own_parts(dout_ptr, first_row, dout.stride_m, rows_q, V_DIM, BLOCK_M, BLOCK_V, SPECIALIZED)
    rows = first_row + tl.arange(0, BLOCK_M)
    lse_log2 = _load_log2_sum(lse_ptr + statistics, rows, rows_q)
    delta = tl.load(delta_ptr + statistics + rows, mask=rows < rows_q, other=0.0)
    slope = _slope_of(score.slopes, batch, head)
    accumulator = _zero_parts(HEAD_DIM, BLOCK_M, BLOCK_D)
    begin, full_begin, full_end, end = _key_schedule(
        first_row, seq_k, low, high, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for part in tl.static_range(3 if ONE_LOOP else 0 if HAS_LEFT else 1, 4 if ONE_LOOP else 3):
        first, last = _stretch(part, begin, full_begin, full_end, end)
        accumulator = _accumulate_dq(
            accumulator, query, grad, lse_log2, delta, k_rows, v_rows,
            score, slope, batch, head, HEADS, first_row, first, last, rows_q, seq_k, offset, low, high,
            HAS_LEFT, HAS_RIGHT, part != 1, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            ONE_LOOP, SPECIALIZED,
        )  # fmt: skip
    _store_parts(
        dq_ptr, _scaled(accumulator, scale), first_row, dq.stride_m, rows_q, HEAD_DIM, BLOCK_M, BLOCK_D
    )


def launch_dq(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    asked: AttentionOptions,
    score: Score,
    plan: AttentionLaunch,
) -> None:
    tiles, grid, constants = plan
    if tiles.form == "warp_groups":
        from fastattn.kernels.attention_backward_dq_warp_groups import launch_dq_warp_groups

        launch_dq_warp_groups(dq, dout, q, k, v, lse, delta, asked, plan)
        return
    launch(
        _attention_dq_kernel,
        grid,
        constants,
        scratch=q.device if tiles.form == "specialized" else None,
        q=rows_of(q),
        k=read_rows(k, tiles, tiles.block_n, constants["BLOCK_D"]),
        v=read_rows(v, tiles, tiles.block_n, constants["BLOCK_V"]),
        dout=rows_of(dout),
        dq=rows_of(dq),
        lse_ptr=lse,
        delta_ptr=delta,
        score=score,
        sequences=sequences_of(asked),
        scale=asked.scale,
    )
