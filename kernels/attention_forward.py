"""Attention, forward: softmax(scale * q k^T) v for a tile of queries, keys seen tile by tile.

Algorithm 1 of FlashAttention-2 (Dao, 2023): the output is accumulated relative to a running maximum and divided
once at the end; nothing of size seq_q x seq_k exists. What modifies a score is in `_scores`, which keys are visited
in `_tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import _in_elements, read_rows, rows_of, score_of, sequences_of
from fastattn.kernels._attention_forms import layout_reason, warp_groups_reason
from fastattn.kernels._attention_plan import forward_layout, forward_plan, read_in_place
from fastattn.kernels._attention_tables import AttentionConfig
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_out
from fastattn.kernels._math import LN_2, LOG2_E, _online_softmax_step
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._parts import (
    _add_product,
    _load_own_parts,
    _load_parts,
    _over,
    _products_of_rows,
    _scaled,
    _store_parts,
    _zero_parts,
)
from fastattn.kernels._quantized import (
    E4M3_SHIFT,
    E4M3_UNSHIFT,
    _add_values,
    _first_block,
    _in_value_order,
    _load_value_scales,
    _load_value_tile,
    _terms_of,
    _terms_of_tile,
    _with_sink,
)
from fastattn.kernels._scores import _dropped, _scores_of, _slope_of
from fastattn.kernels._tiles import (
    _heads_of_rows,
    _key_schedule,
    _key_window,
    _own_split,
    _queries_of_rows,
    _rows_at,
    _sequence,
    _split_program,
    _stretch,
    _visible,
)
from fastattn.kernels.attention_combine import attention_combine, empty_parts


@triton.jit
def _attend_keys(
    accumulator,
    row_max,
    row_sum,
    q,
    k_rows,
    v_rows,
    score,
    slope,
    terms,
    batch,
    head,
    HEADS,
    first_row,
    rows,
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
    """Folds keys begin .. end, BLOCK_N at a time, into (accumulator, row_max, row_sum)."""
    ENDS: tl.constexpr = "rows" if ONE_LOOP else "none"
    rows = rows[:, None]  # (BLOCK_M, 1), from the tile's first query on, as keys are
    keys = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    for first_key in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZED):
        k = _load_parts(k_rows, first_key, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        products = _products_of_rows(q, k)  # (BLOCK_M, BLOCK_N)
        of_tile = None
        if terms is not None:
            of_tile = _terms_of_tile(terms, first_key)
        scores, _cap_slope = _scores_of(
            products, score, slope, batch, head, first_row, first_key, rows, keys, SEQ_Q, OFFSET, of_tile
        )
        if MASKED:
            visible = _visible(first_row, first_key, rows, keys, SEQ_K, LOW, HIGH, HAS_LEFT, HAS_RIGHT, ENDS)
            scores = tl.where(visible, scores, float("-inf"))
        SHIFT: tl.constexpr = 0 if terms is None else E4M3_SHIFT
        weights, rescale, row_max, row_sum = _online_softmax_step(scores, row_max, row_sum, SHIFT)
        weights = _dropped(weights, score.dropout, batch, head, HEADS, first_row, first_key, rows, keys)
        if terms is None:
            v = _load_parts(v_rows, first_key, SEQ_K, V_DIM, BLOCK_N, BLOCK_V, MAY_OVERRUN=MASKED)
            accumulator = _add_product(_scaled(accumulator, rescale[:, None]), weights.to(v[0].dtype), v)
        else:
            values = _load_value_tile(v_rows, first_key, BLOCK_N, BLOCK_V)
            rescaled = accumulator[0] * rescale[:, None]
            accumulator = (_add_values(rescaled, _in_value_order(weights).to(values.dtype), values),)
    return accumulator, row_max, row_sum


# Each by itself: of a tuple's members Triton 3.6 and 3.7 make constants and multiples of 16, whatever is named here.
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
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    score,
    sequences,
    sinks_ptr,
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
    FOLDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program computes BLOCK_M rows of out and lse of one head of one sequence.

    Grid (cdiv(MAX_SEQ_Q, BLOCK_M) * HEADS * sequences,), last tile of a head first: under a causal mask it is the
    longest. Heads are in the order of `_split_program`. q and out are `Rows`, k and v too or both descriptors of (1, 1,
    BLOCK_N, width), lse (batch, HEADS, SEQ_Q), contiguous; SEQ_Q and SEQ_K are the tensors'.

    FOLDED: a tile's rows are those of all heads of a group, as `_heads_of_rows` says; MAX_SEQ_Q * GROUPS rows and
    HEADS // GROUPS heads in the grid. SPLIT: each program sees a part of the keys, of as many as axis 1 of the grid
    has. Then out, (batch * splits, HEADS, SEQ_Q, V_DIM), takes accumulators, lse, (batch * splits, 2, HEADS, SEQ_Q),
    maxima in base 2 and sums, and sinks are `attention_combine`'s.
    """
    q, k, v, out = _in_elements(q), _in_elements(k), _in_elements(v), _in_elements(out)
    if FOLDED:
        tile, batch, kv_head = _split_program(tl.cdiv(MAX_SEQ_Q * GROUPS, BLOCK_M), HEADS // GROUPS)
        head = kv_head * GROUPS
    else:
        tile, batch, head = _split_program(tl.cdiv(MAX_SEQ_Q, BLOCK_M), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
        kv_head = head // GROUPS
    held, start_q, rows_q = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    _held, start_k, rows_k = _sequence(batch, sequences.starts_k, SEQ_K, MAX_SEQ_K)
    seq_k, offset, low, high = _key_window(
        batch, sequences.key_lengths, rows_q, rows_k, LEFT, RIGHT, BOTTOM_RIGHT
    )
    first_row = (tl.cdiv(rows_q * GROUPS if FOLDED else rows_q, BLOCK_M) - 1 - tile) * BLOCK_M
    # Only packed rows return here, but the compiler computes with the sign it learns. Before a specialized loop, which
    # has no packed rows, it takes no return.
    if not SPECIALIZED:
        if first_row < 0:
            return
    heads = _heads_of_rows(first_row, head, GROUPS, BLOCK_M, FOLDED)
    column = heads[:, None] if FOLDED else heads
    place = held
    if SPLIT:
        place = held * tl.num_programs(1) + tl.program_id(1)
    q_ptr = q.ptr + held * q.stride_b + column * q.stride_h + start_q * q.stride_m
    k_rows = _rows_at(k, held, kv_head, start_k)
    # A row of values in e4m3 is a block of keys.
    block = _first_block(batch, sequences.starts_k, start_k)
    v_rows = _rows_at(v, held, kv_head, start_k if score.quantized is None else block)
    out_ptr = out.ptr + place * out.stride_b + column * out.stride_h + start_q * out.stride_m
    lse_ptr += ((place * 2 if SPLIT else place) * HEADS + heads) * SEQ_Q + start_q

    first_row, rows = _queries_of_rows(first_row, GROUPS, BLOCK_M, FOLDED)
    query = _load_own_parts(
        q_ptr, first_row, q.stride_m, rows_q, HEAD_DIM, BLOCK_M, BLOCK_D, SPECIALIZED, rows
    )
    accumulator = _zero_parts(V_DIM, BLOCK_M, BLOCK_V)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    terms = None
    if score.quantized is not None:
        terms = _terms_of(
            score, held, heads, kv_head, start_q, first_row, rows, rows_q, block, HEADS, HEADS // GROUPS, SEQ_Q, SEQ_K
        )  # fmt: skip
    if sinks_ptr is not None and terms is None:
        # One more key, seen first, whose value is 0.
        row_max = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    slope = _slope_of(score.slopes, batch, column)
    begin, full_begin, full_end, end = _key_schedule(
        first_row, seq_k, low, high, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if SPLIT:
        begin, full_begin, full_end, end = _own_split(begin, full_begin, full_end, end, BLOCK_N)
    for part in tl.static_range(3 if ONE_LOOP else 0 if HAS_LEFT else 1, 4 if ONE_LOOP else 3):
        first, last = _stretch(part, begin, full_begin, full_end, end)
        accumulator, row_max, row_sum = _attend_keys(
            accumulator, row_max, row_sum, query, k_rows, v_rows,
            score, slope, terms, batch, head, HEADS, first_row, rows, first, last, rows_q, seq_k, offset, low, high,
            HAS_LEFT, HAS_RIGHT, part != 1, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            ONE_LOOP, SPECIALIZED,
        )  # fmt: skip

    if sinks_ptr is not None and terms is not None:
        sink = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
        row_max, row_sum, rescale = _with_sink(row_max, row_sum, sink)
        accumulator = _scaled(accumulator, rescale[:, None])
    result = accumulator
    if not SPLIT:
        # A row that saw no key has row_sum 0: its output is 0 / 1 and its lse -inf.
        result = _over(accumulator, tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    elif terms is not None:  # as `attention_combine` has them, and sinks
        result = _scaled(accumulator, E4M3_UNSHIFT)
        row_sum = row_sum * E4M3_UNSHIFT
    if terms is not None:
        scales = _load_value_scales(score, batch, kv_head, HEADS // GROUPS, BLOCK_V, BLOCK_D)
        result = _scaled(result, scales[None, :])
    _store_parts(out_ptr, result, first_row, out.stride_m, rows_q, V_DIM, BLOCK_M, BLOCK_V, rows)
    rows = first_row + rows
    if SPLIT:
        tl.store(lse_ptr + rows, row_max, mask=rows < rows_q)
        tl.store(lse_ptr + tl.cast(HEADS, tl.int64) * SEQ_Q + rows, row_sum, mask=rows < rows_q)
    else:
        lse = row_max + tl.log2(row_sum)  # (BLOCK_M,)
        lse = (lse if terms is None else lse - E4M3_SHIFT) * LN_2
        tl.store(lse_ptr + rows, tl.where(row_sum == 0.0, float("-inf"), lse), mask=rows < rows_q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *options: object, config: AttentionConfig | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of `fastattn.attention`.

    Args:
        q: (batch, heads, seq_q, head_dim).
        k, v: (batch, kv_heads, seq_k, head_dim) and (batch, kv_heads, seq_k, v_dim).
        options: the fields of `AttentionOptions`.
        config: replaces the one chosen for the shape and device, also where queries are few (`few_queries_grid`); see
            `fitting_config` for one with descriptors.

    Returns:
        out (batch, heads, seq_q, v_dim), and lse (batch, heads, seq_q), float32, natural logarithm.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    packed = asked.cu_seqlens_q is not None
    out = empty_out(q, v)
    batch, heads, seq_q, _ = q.shape
    lse = torch.empty(
        batch, heads, seq_q, dtype=torch.float32, device=q.device
    )  # half the time of q.new_empty
    if packed or q.numel() == 0 or v.numel() == 0:
        # Rows of no sequence are no program's; without keys a row's lse is its sink.
        out.zero_()
        lse.fill_(float("-inf"))
        if not packed:
            return out, lse if asked.sinks is None else lse.copy_(asked.sinks.view(-1, 1).expand_as(lse))
    layout = forward_layout(q, k, v, asked, config)
    plan = forward_plan(*layout)
    q, k, v = read_in_place((q, k, v), plan.in_place)
    if plan.descriptors and layout_reason((k, v), asked) is not None:
        plan = forward_plan(*layout, described=False)
    if plan.forward.tiles.form == "warp_groups":
        if warp_groups_reason(q, _target.target_of(q.device), asked) is None:
            from fastattn.kernels.attention_forward_warp_groups import launch_warp_groups

            launch_warp_groups(q, k, v, out, lse, asked, plan.forward)
            return out, lse
        plan = forward_plan(*layout, described=False)
    tiles, grid, constants = plan.forward
    if grid[0] == 0:
        return out, lse
    sinks = None if asked.sinks is None else asked.sinks.contiguous()
    combine = plan.combine
    parts = None if combine is None else empty_parts(out, grid[1])
    with _target.launching_on(q):
        launch(
            _attention_forward_kernel,
            grid,
            constants,
            scratch=q.device if tiles.form == "specialized" else None,
            q=rows_of(q),
            k=read_rows(k, tiles, tiles.block_n, constants["BLOCK_D"]),
            v=read_rows(v, tiles, tiles.block_n, constants["BLOCK_V"]),
            out=rows_of(out if parts is None else parts[0]),
            lse_ptr=lse if parts is None else parts[1],
            score=score_of(asked, q),
            sequences=sequences_of(asked),
            sinks_ptr=sinks if parts is None else None,
            SEQ_K=k.size(2),
            MAX_SEQ_K=asked.longest_k(k.size(2)),
        )
        if parts is not None and combine is not None:
            attention_combine(*parts, out, lse, sinks, asked, combine)
    return out, lse
