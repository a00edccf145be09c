"""Attention, backward for the bias: dB = dS, summed over every dimension in which the bias is broadcast.

One program takes a tile of the bias and walks all scores that read it, so that nothing is added up across programs:
no atomics, the same bits from run to run, and no memory but the gradient's own. It computes the scores and dP once
more: two products beside the seven of dq, dk and dv (see attention_backward).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels._arguments import Plane, Score, _in_elements, rows_of, sequences_of
from fastattn.kernels._attention_plan import AttentionLaunch
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._parts import _load_parts, _products_of_rows
from fastattn.kernels._scores import _dropped, _scores_of, _slope_of
from fastattn.kernels._tiles import (
    _key_window,
    _load_log2_sum,
    _query_schedule,
    _rows_at,
    _sequence,
    _visible,
)


@triton.jit
def _accumulate_dbias(
    total,
    q,
    k,
    v,
    dout,
    lse_ptr,
    delta_ptr,
    score,
    sequences,
    batch,
    head,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    MAX_SEQ_Q,
    MAX_SEQ_K,
    LEFT,
    RIGHT,
    tile_row,
    tile_key,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds one head's dS to total (BLOCK_M, BLOCK_N): of the tile alone, or of all its rows or keys too."""
    held, start_q, rows_q = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    _held, start_k, rows_k = _sequence(batch, sequences.starts_k, SEQ_K, MAX_SEQ_K)
    seq_k, offset, low, high = _key_window(
        batch, sequences.key_lengths, rows_q, rows_k, LEFT, RIGHT, BOTTOM_RIGHT
    )
    kv_head = head // GROUPS
    q_rows = _rows_at(q, held, head, start_q)
    dout_rows = _rows_at(dout, held, head, start_q)
    k_rows = _rows_at(k, held, kv_head, start_k)
    v_rows = _rows_at(v, held, kv_head, start_k)
    statistics = (held * HEADS + head) * SEQ_Q + start_q
    slope = _slope_of(score.slopes, batch, head)
    rows = tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1), within the tile, as keys are
    keys = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    last_key = seq_k if ALL_KEYS else tl.minimum(seq_k, tile_key + BLOCK_N)
    for first_key in tl.range(tile_key, last_key, BLOCK_N):
        key = _load_parts(k_rows, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=True)
        value = _load_parts(v_rows, first_key, seq_k, V_DIM, BLOCK_N, BLOCK_V, MAY_OVERRUN=True)
        begin, _full_begin, _full_end, end = _query_schedule(
            first_key, rows_q, low, high, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        if not ALL_ROWS:
            begin = tl.maximum(begin, tile_row)
            end = tl.minimum(end, tile_row + BLOCK_M)
        for first_row in tl.range(begin, end, BLOCK_M):
            query = _load_parts(q_rows, first_row, rows_q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
            grad = _load_parts(dout_rows, first_row, rows_q, V_DIM, BLOCK_M, BLOCK_V, MAY_OVERRUN=True)
            places = first_row + tl.arange(0, BLOCK_M)
            lse_log2 = _load_log2_sum(lse_ptr + statistics, places, rows_q)
            delta = tl.load(delta_ptr + statistics + places, mask=places < rows_q, other=0.0)
            products = _products_of_rows(query, key)  # (BLOCK_M, BLOCK_N)
            scores, _cap_slope = _scores_of(
                products, score, slope, batch, head, first_row, first_key, rows, keys, rows_q, offset
            )
            visible = _visible(
                first_row, first_key, rows, keys, seq_k, low, high, HAS_LEFT, HAS_RIGHT, "none"
            )
            weights = tl.where(visible, tl.exp2(scores - lse_log2[:, None]), 0.0)
            dweights = _products_of_rows(grad, value)  # (BLOCK_M, BLOCK_N)
            dweights = _dropped(dweights, score.dropout, batch, head, HEADS, first_row, first_key, rows, keys)
            total += weights * (dweights - delta[:, None])
    return total


# Each by itself: of a tuple's members Triton 3.6 and 3.7 make constants and multiples of 16, whatever is named here.
@triton.jit(
    do_not_specialize=[
        "HEADS",
        "SEQ_Q",
        "SEQ_K",
        "SEQUENCES",
        "MAX_SEQ_Q",
        "MAX_SEQ_K",
        "LEFT",
        "RIGHT",
        "BIAS_Q",
        "BIAS_K",
    ]
)
def _attention_dbias_kernel(
    q,
    k,
    v,
    dout,
    dbias,
    lse_ptr,
    delta_ptr,
    score,
    sequences,
    SEQUENCES,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    BIAS_Q,
    BIAS_K,
    MAX_SEQ_Q,
    MAX_SEQ_K,
    LEFT,
    RIGHT,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    ALL_BATCHES: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program computes a tile of dbias, (BIAS_Q, BIAS_K) of one of its heads and batches.

    Grid (tiles of keys * tiles of rows * heads * batches of the bias,), keys fastest. ALL_*: the bias has the size 1
    in that dimension, and the program walks all of it.
    """
    q, k, v, dout = _in_elements(q), _in_elements(k), _in_elements(v), _in_elements(dout)
    program = tl.program_id(0)
    tiles_k = 1 if ALL_KEYS else tl.cdiv(BIAS_K, BLOCK_N)
    tiles_q = 1 if ALL_ROWS else tl.cdiv(BIAS_Q, BLOCK_M)
    tile_key = program % tiles_k * BLOCK_N
    tile_row = program // tiles_k % tiles_q * BLOCK_M
    plane = program // tiles_k // tiles_q
    bias_head = plane * 0 if ALL_HEADS else plane % HEADS
    bias_batch = plane if ALL_HEADS else plane // HEADS
    last_head = HEADS if ALL_HEADS else bias_head + 1
    last_batch = SEQUENCES if ALL_BATCHES else bias_batch + 1
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch in range(bias_batch, last_batch):
        for head in range(bias_head, last_head):
            total = _accumulate_dbias(
                total, q, k, v, dout, lse_ptr, delta_ptr, score, sequences,
                tl.cast(batch, tl.int64), tl.cast(head, tl.int64), HEADS, GROUPS, SEQ_Q, SEQ_K,
                MAX_SEQ_Q, MAX_SEQ_K, LEFT, RIGHT,
                tile_row, tile_key, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, ALL_ROWS, ALL_KEYS,
                HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]
    keys = tl.arange(0, BLOCK_N)[None, :]
    if ALL_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        rows = tl.zeros((1, 1), tl.int32)
    if ALL_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        keys = tl.zeros((1, 1), tl.int32)
    corner = (
        dbias.ptr
        + tl.cast(bias_batch, tl.int64) * dbias.stride_b
        + tl.cast(bias_head, tl.int64) * dbias.stride_h
    )
    corner += tl.cast(tile_row, tl.int64) * dbias.stride_m + tl.cast(tile_key, tl.int64) * dbias.stride_n
    inside = (tile_row + rows < BIAS_Q) & (tile_key + keys < BIAS_K)
    offsets = rows * dbias.stride_m + keys * dbias.stride_n
    tl.store(corner + offsets, total.to(dbias.ptr.dtype.element_ty), mask=inside)


def launch_dbias(
    dbias: Tensor,
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
    bias_batch, bias_heads, bias_q, bias_k = dbias.shape
    tiles = plan.tiles
    programs = ceil_div(bias_q, tiles.block_m) * ceil_div(bias_k, tiles.block_n) * bias_heads * bias_batch
    launch(
        _attention_dbias_kernel,
        (programs,),
        plan.constants,
        q=rows_of(q),
        k=rows_of(k),
        v=rows_of(v),
        dout=rows_of(dout),
        dbias=Plane(dbias, dbias.stride(0), dbias.stride(1), dbias.stride(2), dbias.stride(3), dbias.size(3)),
        lse_ptr=lse,
        delta_ptr=delta,
        score=score,
        sequences=sequences_of(asked),
        BIAS_Q=bias_q,
        BIAS_K=bias_k,
        ALL_BATCHES=bias_batch == 1,
        ALL_HEADS=bias_heads == 1,
        ALL_ROWS=bias_q == 1,
        ALL_KEYS=bias_k == 1,
    )
