"""Attention, forward: softmax(scale * q k^T) v for a tile of queries, keys seen tile by tile.

Algorithm 1 of FlashAttention-2 (Dao, 2023): the output is accumulated relative to a running maximum and divided
once at the end; nothing of size seq_q x seq_k exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import AttentionConfig, select_attention_config
from fastattn.kernels._layout import block_d, causal_offset, empty_rows, rows_contiguous
from fastattn.kernels._math import LN_2, LOG2_E, _modified_scores, _online_softmax_step
from fastattn.kernels._tiles import _key_schedule, _load_rows, _split_program, _store_rows, _visible


@triton.jit
def _attend_keys(
    accumulator,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    first_row,
    begin,
    end,
    stride_kn,
    stride_vn,
    SEQ_K,
    scale_log2,
    CAUSAL_OFFSET,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Folds keys begin .. end, BLOCK_N at a time, into (accumulator, row_max, row_sum)."""
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    for first_key in tl.range(begin, end, BLOCK_N):
        keys = (first_key + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
        k = _load_rows(k_ptr, first_key, stride_kn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        scores = _modified_scores(scores, rows, keys, scale_log2)
        if MASKED:
            scores = tl.where(_visible(rows, keys, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL), scores, float("-inf"))
        weights, rescale, row_max, row_sum = _online_softmax_step(scores, row_max, row_sum)
        v = _load_rows(v_ptr, first_key, stride_vn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee")
    return accumulator, row_max, row_sum


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q", "SEQ_K", "CAUSAL_OFFSET"])
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    scale_log2,
    CAUSAL_OFFSET,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of out and lse of one head.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,), last tile of a head first: under a causal mask it is the
    longest. The last dimension of q, k, v and out is contiguous; lse is (batch, HEADS, SEQ_Q), contiguous.
    """
    tiles = tl.cdiv(SEQ_Q, BLOCK_M)
    tile, batch, head = _split_program(tiles, HEADS)
    first_row = (tiles - 1 - tile) * BLOCK_M
    kv_head = head // GROUPS
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    lse_ptr += (batch * HEADS + head) * SEQ_Q

    q = _load_rows(q_ptr, first_row, stride_qm, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    full_end, end = _key_schedule(first_row, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL, BLOCK_M, BLOCK_N)
    accumulator, row_max, row_sum = _attend_keys(
        accumulator, row_max, row_sum, q, k_ptr, v_ptr, first_row, 0, full_end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, False, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    accumulator, row_max, row_sum = _attend_keys(
        accumulator, row_max, row_sum, q, k_ptr, v_ptr, first_row, full_end, end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, True, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # A row that saw no key has row_sum 0: its output is 0 / 1 and its lse -inf.
    out = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    _store_rows(out_ptr, out, first_row, stride_om, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK_M)
    lse = (row_max + tl.log2(row_sum)) * LN_2  # (BLOCK_M,)
    tl.store(lse_ptr + rows, tl.where(row_sum == 0.0, float("-inf"), lse), mask=rows < SEQ_Q)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: str,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of `fastattn.attention`.

    Args:
        q: (batch, heads, seq_q, head_dim).
        k, v: (batch, kv_heads, seq_k, head_dim).
        causal: "none", "top_left" or "bottom_right".
        config: replaces the one chosen for the shape and device.

    Returns:
        out like q, and lse (batch, heads, seq_q), float32, natural logarithm.
    """
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k = k.size(1), k.size(2)
    out = empty_rows(q)
    lse = torch.empty((batch, heads, seq_q), device=q.device, dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if config is None:
        config = select_attention_config(head_dim, q.dtype, _target.target_of(q.device))
    tiles = config.forward
    with _target.launching_on(q):
        _attention_forward_kernel[(triton.cdiv(seq_q, tiles.block_m) * heads * batch,)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
            stride_qb=q.stride(0), stride_qh=q.stride(1), stride_qm=q.stride(2),
            stride_kb=k.stride(0), stride_kh=k.stride(1), stride_kn=k.stride(2),
            stride_vb=v.stride(0), stride_vh=v.stride(1), stride_vn=v.stride(2),
            stride_ob=out.stride(0), stride_oh=out.stride(1), stride_om=out.stride(2),
            HEADS=heads, GROUPS=heads // kv_heads, SEQ_Q=seq_q, SEQ_K=seq_k,
            scale_log2=scale * LOG2_E.value,
            CAUSAL_OFFSET=causal_offset(causal, seq_q, seq_k),
            HEAD_DIM=head_dim, IS_CAUSAL=causal != "none",
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d(head_dim),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse
