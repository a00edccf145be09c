"""Attention, backward for keys and values: dK = scale * dS^T Q and dV = P^T dO (see attention_backward).

One program takes a tile of keys, so that nothing is added up across programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels._config import AttentionConfig
from fastattn.kernels._layout import block_d, causal_offset
from fastattn.kernels._math import LOG2_E, _modified_scores
from fastattn.kernels._tiles import (
    _load_rows,
    _query_schedule,
    _split_program,
    _store_rows,
    _visible,
)


@triton.jit
def _accumulate_dk_dv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    first_key,
    begin,
    end,
    stride_qm,
    stride_dom,
    SEQ_Q,
    SEQ_K,
    scale_log2,
    CAUSAL_OFFSET,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds dS^T Q and P^T dO of queries begin .. end, BLOCK_M at a time, to dk and dv (BLOCK_N, BLOCK_D).

    Scores are held transposed, (BLOCK_N, BLOCK_M), so that P^T and dS^T enter their products from registers.
    """
    keys = (first_key + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    for first_row in tl.range(begin, end, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        q = _load_rows(q_ptr, first_row, stride_qm, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
        dout = _load_rows(
            dout_ptr, first_row, stride_dom, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True
        )
        # Beyond the last row: lse = +inf makes the weights 0.
        lse_log2 = tl.load(lse_ptr + rows, mask=rows < SEQ_Q, other=float("inf")) * LOG2_E
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        scores = _modified_scores(scores, rows[None, :], keys, scale_log2)
        weights = tl.exp2(scores - lse_log2[None, :])
        if MASKED:
            visible = _visible(rows[None, :], keys, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL)
            weights = tl.where(visible, weights, 0.0)
        if NEEDS_DV:
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        if NEEDS_DK:
            delta = tl.load(delta_ptr + rows, mask=rows < SEQ_Q, other=0.0)
            dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["KV_HEADS", "SEQ_Q", "SEQ_K", "CAUSAL_OFFSET"])
def _attention_dk_dv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn,
    KV_HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    scale,
    scale_log2,
    CAUSAL_OFFSET,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N rows of dk and dv of one key head, over all queries of its GROUPS heads.

    Grid (cdiv(SEQ_K, BLOCK_N) * KV_HEADS * batch,), first tile of a head first: under a causal mask it is the
    longest. Last dimensions are contiguous; lse and delta are (batch, KV_HEADS * GROUPS, SEQ_Q), contiguous.
    """
    tile, batch, kv_head = _split_program(tl.cdiv(SEQ_K, BLOCK_N), KV_HEADS)
    first_key = tile * BLOCK_N
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh
    k = _load_rows(k_ptr, first_key, stride_kn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=True)
    v = _load_rows(v_ptr, first_key, stride_vn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D, MAY_OVERRUN=True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin, full_begin = _query_schedule(first_key, SEQ_Q, CAUSAL_OFFSET, IS_CAUSAL, BLOCK_M, BLOCK_N)
    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        head_q_ptr = q_ptr + batch * stride_qb + head * stride_qh
        head_dout_ptr = dout_ptr + batch * stride_dob + head * stride_doh
        statistics = (batch * KV_HEADS * GROUPS + head) * SEQ_Q
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, head_q_ptr, head_dout_ptr, lse_ptr + statistics, delta_ptr + statistics, first_key,
            begin, tl.minimum(full_begin, SEQ_Q), stride_qm, stride_dom, SEQ_Q, SEQ_K, scale_log2,
            CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, NEEDS_DK, NEEDS_DV, True, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, head_q_ptr, head_dout_ptr, lse_ptr + statistics, delta_ptr + statistics, first_key,
            full_begin, SEQ_Q, stride_qm, stride_dom, SEQ_Q, SEQ_K, scale_log2,
            CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, NEEDS_DK, NEEDS_DV, False, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if NEEDS_DK:
        _store_rows(dk_ptr, dk * scale, first_key, stride_dkn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D)
    if NEEDS_DV:
        _store_rows(dv_ptr, dv, first_key, stride_dvn, SEQ_K, HEAD_DIM, BLOCK_N, BLOCK_D)


def launch_dk_dv(
    dk: Tensor | None,
    dv: Tensor | None,
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
    tiles = config.dk_dv
    needs_dk, needs_dv = dk is not None, dv is not None
    # The kernel writes no gradient that is not needed; any tensor can stand for its pointer.
    dk, dv = k if dk is None else dk, v if dv is None else dv
    _attention_dk_dv_kernel[(triton.cdiv(seq_k, tiles.block_n) * kv_heads * batch,)](
        q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, dk_ptr=dk, dv_ptr=dv, lse_ptr=lse, delta_ptr=delta,
        stride_qb=q.stride(0), stride_qh=q.stride(1), stride_qm=q.stride(2),
        stride_kb=k.stride(0), stride_kh=k.stride(1), stride_kn=k.stride(2),
        stride_vb=v.stride(0), stride_vh=v.stride(1), stride_vn=v.stride(2),
        stride_dob=dout.stride(0), stride_doh=dout.stride(1), stride_dom=dout.stride(2),
        stride_dkb=dk.stride(0), stride_dkh=dk.stride(1), stride_dkn=dk.stride(2),
        stride_dvb=dv.stride(0), stride_dvh=dv.stride(1), stride_dvn=dv.stride(2),
        KV_HEADS=kv_heads, GROUPS=heads // kv_heads, SEQ_Q=seq_q, SEQ_K=seq_k,
        scale=scale, scale_log2=scale * LOG2_E.value,
        CAUSAL_OFFSET=causal_offset(causal, seq_q, seq_k),
        HEAD_DIM=head_dim, IS_CAUSAL=causal != "none", NEEDS_DK=needs_dk, NEEDS_DV=needs_dv,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d(head_dim),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
