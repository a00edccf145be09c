"""Attention, backward for keys and values: dK = scale * dS^T Q and dV = P^T dO (see attention_backward).

One program takes a tile of keys, so that nothing is added up across programs.
"""

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
    _add_product_to_rows,
    _load_own_parts,
    _load_parts,
    _only,
    _products_of_rows,
    _scaled,
    _store_parts,
    _zero_parts,
)
from fastattn.kernels._scores import _dropped, _scores_of, _slope_of
from fastattn.kernels._tiles import (
    _key_window,
    _load_log2_sum,
    _of_head,
    _query_schedule,
    _rows_at,
    _sequence,
    _split_program,
    _stretch,
    _visible,
)


@triton.jit
def _accumulate_dk_dv(
    dk,
    dv,
    k,
    v,
    q_rows,
    dout_rows,
    dq_rows,
    lse_ptr,
    delta_ptr,
    stride_lse,
    score,
    batch,
    first_head,
    HEADS,
    first_key,
    begin,
    end,
    lap,
    lap_begin,
    SEQ_Q,
    SEQ_K,
    OFFSET,
    LOW,
    HIGH,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
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
    """Adds dS^T Q and P^T dO of queries begin .. end, BLOCK_M at a time, to dk and dv; dS K to dq's rows, if given.

    With ONE_LOOP begin .. end counts tiles instead, of several heads: `lap` tiles of each, from query `lap_begin` on.
    Scores are held transposed, (BLOCK_N, BLOCK_M), so that P^T and dS^T enter their products from registers.
    """
    ENDS: tl.constexpr = "keys" if ONE_LOOP else "none"
    keys = tl.arange(0, BLOCK_N)[:, None]  # (BLOCK_N, 1), within the tile, as rows are
    rows = tl.arange(0, BLOCK_M)[None, :]  # (1, BLOCK_M)
    head = first_head
    slope = _slope_of(score.slopes, batch, head)
    for step in tl.range(begin, end, 1 if ONE_LOOP else BLOCK_M, warp_specialize=SPECIALIZED):
        first_row = step
        member = 0
        if ONE_LOOP:
            member = step // lap
            first_row = lap_begin + (step - member * lap) * BLOCK_M
            head = first_head + member
            slope = _slope_of(score.slopes, batch, head)
        q = _load_parts(
            _of_head(q_rows, member), first_row, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True
        )
        dout = _load_parts(
            _of_head(dout_rows, member), first_row, SEQ_Q, V_DIM, BLOCK_M, BLOCK_V, MAY_OVERRUN=True
        )
        places = first_row + tl.arange(0, BLOCK_M)
        statistics = tl.cast(member, tl.int64) * stride_lse
        lse_log2 = _load_log2_sum(lse_ptr + statistics, places, SEQ_Q)
        products = _products_of_rows(k, q)  # (BLOCK_N, BLOCK_M)
        scores, cap_slope = _scores_of(
            products, score, slope, batch, head, first_row, first_key, rows, keys, SEQ_Q, OFFSET
        )
        weights = tl.exp2(scores - lse_log2[None, :])
        if MASKED:
            visible = _visible(first_row, first_key, rows, keys, SEQ_K, LOW, HIGH, HAS_LEFT, HAS_RIGHT, ENDS)
            weights = tl.where(visible, weights, 0.0)
        if NEEDS_DV:
            kept = _dropped(weights, score.dropout, batch, head, HEADS, first_row, first_key, rows, keys)
            dv = _add_product(dv, kept.to(dout[0].dtype), dout)
        if NEEDS_DK:
            delta = tl.load(delta_ptr + statistics + places, mask=places < SEQ_Q, other=0.0)
            dweights = _products_of_rows(v, dout)  # (BLOCK_N, BLOCK_M)
            dweights = _dropped(dweights, score.dropout, batch, head, HEADS, first_row, first_key, rows, keys)
            dscores = weights * (dweights - delta[None, :])
            if score.softcap is not None:
                dscores = dscores * cap_slope
            dscores = dscores.to(q[0].dtype)
            dk = _add_product(dk, dscores, q)
            if dq_rows is not None:
                place = _of_head(dq_rows, member)
                _add_product_to_rows(
                    place, tl.trans(dscores), k, first_row, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D
                )
    return dk, dv


# Each by itself: of a tuple's members Triton 3.6 and 3.7 make constants and multiples of 16, whatever is named here.
@triton.jit(
    do_not_specialize=[
        "KV_HEADS",
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
def _attention_dk_dv_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    dq,
    lse_ptr,
    delta_ptr,
    score,
    sequences,
    scale,
    KV_HEADS,
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
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    """One program computes BLOCK_N rows of dk and dv of one key head, over all queries of its GROUPS heads.

    Grid (cdiv(MAX_SEQ_K, BLOCK_N) * KV_HEADS * sequences,), first tile of a head first: under a causal mask it is
    the longest. The tensors are `Rows`, q and dout or both descriptors; lse and delta are (batch, KV_HEADS * GROUPS,
    SEQ_Q), contiguous. dq, if not None, is in float32, and what these keys contribute is added there by atomics,
    without the scale.
    """
    q, k, v, dout = _in_elements(q), _in_elements(k), _in_elements(v), _in_elements(dout)
    dk, dv = _in_elements(dk), _in_elements(dv)
    if dq is not None:
        dq = _in_elements(dq)
    tile, batch, kv_head = _split_program(tl.cdiv(MAX_SEQ_K, BLOCK_N), KV_HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    held, start_q, rows_q = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    _held, start_k, rows_k = _sequence(batch, sequences.starts_k, SEQ_K, MAX_SEQ_K)
    seq_k, offset, low, high = _key_window(
        batch, sequences.key_lengths, rows_q, rows_k, LEFT, RIGHT, BOTTOM_RIGHT
    )
    first_key = tile * BLOCK_N
    if sequences.starts_k is not None:  # no other tile begins beyond the last key
        if first_key >= rows_k:
            return
    heads = KV_HEADS * GROUPS
    k_ptr = k.ptr + held * k.stride_b + kv_head * k.stride_h + start_k * k.stride_m
    v_ptr = v.ptr + held * v.stride_b + kv_head * v.stride_h + start_k * v.stride_m
    dk_ptr = dk.ptr + held * dk.stride_b + kv_head * dk.stride_h + start_k * dk.stride_m
    dv_ptr = dv.ptr + held * dv.stride_b + kv_head * dv.stride_h + start_k * dv.stride_m
    key = _load_own_parts(k_ptr, first_key, k.stride_m, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, SPECIALIZED)
    value = _load_own_parts(v_ptr, first_key, v.stride_m, seq_k, V_DIM, BLOCK_N, BLOCK_V, SPECIALIZED)
    sum_k = _zero_parts(HEAD_DIM, BLOCK_N, BLOCK_D)
    sum_v = _zero_parts(V_DIM, BLOCK_N, BLOCK_V)
    begin, full_begin, full_end, end = _query_schedule(
        first_key, rows_q, low, high, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if sequences.key_lengths is not None:
        # A tile of hidden keys alone visits no query.
        end = tl.where(first_key < seq_k, end, 0)
        full_end = tl.where(first_key < seq_k, full_end, 0)
    if dq is not None:
        # Keys that are not there have weights that may be infinite, and 0 times these would enter dq: all of such a
        # tile's queries are masked.
        overruns = first_key + BLOCK_N > seq_k
        full_begin = tl.where(overruns, tl.maximum(full_begin, end), full_begin)
        full_end = tl.where(overruns, full_begin, full_end)
    lap = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    # With one loop for all heads of the group, it is a single turn of this one.
    for group in range(1 if ONE_LOOP else GROUPS):
        head = kv_head * GROUPS + group
        statistics = (held * heads + head) * SEQ_Q + start_q
        for part in tl.static_range(
            3 if ONE_LOOP else 0 if HAS_RIGHT or dq is not None else 1,
            4 if ONE_LOOP else 3 if HAS_LEFT else 2,
        ):
            first, last = _stretch(part, begin, full_begin, full_end, end)
            if ONE_LOOP:
                first = begin * 0
                last = lap * GROUPS
            sum_k, sum_v = _accumulate_dk_dv(
                sum_k, sum_v, key, value, _rows_at(q, held, head, start_q), _rows_at(dout, held, head, start_q),
                None if dq is None else _rows_at(dq, held, head, start_q),
                lse_ptr + statistics, delta_ptr + statistics, SEQ_Q, score, batch, head, heads,
                first_key, first, last, lap, begin, rows_q, seq_k, offset, low, high,
                HAS_LEFT, HAS_RIGHT, NEEDS_DK, NEEDS_DV, part != 1,
                HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, ONE_LOOP, SPECIALIZED,
            )  # fmt: skip
    if sequences.key_lengths is not None:
        # Hidden keys entered as zeros, whose weights are not.
        counted = (first_key + tl.arange(0, BLOCK_N) < seq_k)[:, None]
        sum_k = _only(counted, sum_k)
        sum_v = _only(counted, sum_v)
    if NEEDS_DK:
        _store_parts(
            dk_ptr, _scaled(sum_k, scale), first_key, dk.stride_m, rows_k, HEAD_DIM, BLOCK_N, BLOCK_D
        )
    if NEEDS_DV:
        _store_parts(dv_ptr, sum_v, first_key, dv.stride_m, rows_k, V_DIM, BLOCK_N, BLOCK_V)


def launch_dk_dv(
    dk: Tensor | None,
    dv: Tensor | None,
    dq_sum: Tensor | None,
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
    """Fills dk and dv, each unless it is None; with dk also adds dq, not scaled, to `dq_sum` (float32), if given."""
    tiles, grid, constants = plan
    if tiles.form == "warp_groups":
        from fastattn.kernels.attention_backward_dk_dv_warp_groups import launch_dk_dv_warp_groups

        launch_dk_dv_warp_groups(dk, dv, dout, q, k, v, lse, delta, asked, plan)
        return
    needs_dk, needs_dv = dk is not None, dv is not None
    # The kernel writes no gradient that is not needed; any tensor can stand for its pointer.
    dk, dv = k if dk is None else dk, v if dv is None else dv
    launch(
        _attention_dk_dv_kernel,
        grid,
        constants,
        scratch=q.device if tiles.form == "specialized" else None,
        q=read_rows(q, tiles, tiles.block_m, constants["BLOCK_D"]),
        dout=read_rows(dout, tiles, tiles.block_m, constants["BLOCK_V"]),
        k=rows_of(k),
        v=rows_of(v),
        dk=rows_of(dk),
        dv=rows_of(dv),
        dq=None if dq_sum is None else read_rows(dq_sum, tiles, tiles.block_m, constants["BLOCK_D"]),
        lse_ptr=lse,
        delta_ptr=delta,
        score=score,
        sequences=sequences_of(asked),
        scale=asked.scale,
        NEEDS_DK=needs_dk,
        NEEDS_DV=needs_dv,
    )
