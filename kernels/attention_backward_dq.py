"""Attention, backward for the queries: dQ = scale * dS K, a tile of queries a program (see attention_backward)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels._config import AttentionConfig
from fastattn.kernels._layout import block_d, causal_offset
from fastattn.kernels._math import LOG2_E, _modified_scores
from fastattn.kernels._tiles import (
    _key_schedule,
    _load_rows,
    _split_program,
    _store_rows,
    _visible,
)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    dout,
    lse_log2,
    delta,
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
    """Adds dS K of keys begin .. end, BLOCK_N at a time, to dq (BLOCK_M, BLOCK_D)."""
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    for first_key in tl.range(begin, end, BLOCK_N):
        keys = (first_key + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
        k = _load_rows(k_ptr, first_key, stride_kn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        v = _load_rows(v_ptr, first_key, stride_vn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        weights = tl.exp2(_modified_scores(scores, rows, keys, scale_log2) - lse_log2[:, None])
        if MASKED:
            weights = tl.where(_visible(rows, keys, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL), weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q", "SEQ_K", "CAUSAL_OFFSET"])
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom,
    stride_dqb, stride_dqh, stride_dqm,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    scale,
    scale_log2,
    CAUSAL_OFFSET,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of dq of one head, over all keys they see.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,), last tile of a head first. Last dimensions are contiguous; lse
    and delta are (batch, HEADS, SEQ_Q), contiguous.
    """
    tiles = tl.cdiv(SEQ_Q, BLOCK_M)
    tile, batch, head = _split_program(tiles, HEADS)
    first_row = (tiles - 1 - tile) * BLOCK_M
    kv_head = head // GROUPS
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    dout_ptr += batch * stride_dob + head * stride_doh
    dq_ptr += batch * stride_dqb + head * stride_dqh

    q = _load_rows(q_ptr, first_row, stride_qm, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
    dout = _load_rows(dout_ptr, first_row, stride_dom, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
    rows = first_row + tl.arange(0, BLOCK_M)
    statistics = (batch * HEADS + head) * SEQ_Q + rows
    # Beyond the last row: lse = +inf makes the weights 0.
    lse_log2 = tl.load(lse_ptr + statistics, mask=rows < SEQ_Q, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + statistics, mask=rows < SEQ_Q, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full_end, end = _key_schedule(first_row, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL, BLOCK_M, BLOCK_N)
    dq = _accumulate_dq(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, first_row, 0, full_end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, False, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, first_row, full_end, end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, True, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, first_row, stride_dqm, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D)


def launch_dq(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    causal: str,
    config: AttentionConfig,
) -> None:
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k = k.size(1), k.size(2)
    tiles = config.dq
    _attention_dq_kernel[(triton.cdiv(seq_q, tiles.block_m) * heads * batch,)](
        q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, dq_ptr=dq, lse_ptr=lse, delta_ptr=delta,
        stride_qb=q.stride(0), stride_qh=q.stride(1), stride_qm=q.stride(2),
        stride_kb=k.stride(0), stride_kh=k.stride(1), stride_kn=k.stride(2),
        stride_vb=v.stride(0), stride_vh=v.stride(1), stride_vn=v.stride(2),
        stride_dob=dout.stride(0), stride_doh=dout.stride(1), stride_dom=dout.stride(2),
        stride_dqb=dq.stride(0), stride_dqh=dq.stride(1), stride_dqm=dq.stride(2),
        HEADS=heads, GROUPS=heads // kv_heads, SEQ_Q=seq_q, SEQ_K=seq_k,
        scale=scale, scale_log2=scale * LOG2_E.value,
        CAUSAL_OFFSET=causal_offset(causal, seq_q, seq_k),
        HEAD_DIM=head_dim, IS_CAUSAL=causal != "none",
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d(head_dim),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
