"""Attention, backward: dq by tiles of queries, dk and dv by tiles of keys, each recomputing the weights.

With P the weights, S = scale * q k^T and O the output (FlashAttention-2, Dao, 2023, section 3.1.2):

    delta = rowsum(dO * O) - dlse       dP = dO V^T           dS = P * (dP - delta)
    dQ = scale * dS K                   dK = scale * dS^T Q   dV = P^T dO

dlse, the gradient of the log-sum-exp, enters through delta because d lse / d S = P. Two kernels, seven products
and no atomics: the result is the same bit for bit from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import AttentionConfig, select_attention_config
from fastattn.kernels._layout import block_d, causal_offset, empty_rows, rows_contiguous
from fastattn.kernels._math import LOG2_E, _modified_scores
from fastattn.kernels._tiles import (
    _key_schedule,
    _load_rows,
    _query_schedule,
    _split_program,
    _store_rows,
    _visible,
)


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q"])
def _attention_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    stride_ob, stride_oh, stride_om,
    stride_dob, stride_doh, stride_dom,
    HEADS,
    SEQ_Q,
    HEAD_DIM: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes delta = rowsum(dO * O) - dlse of BLOCK_M rows of one head.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,); dlse and delta are (batch, HEADS, SEQ_Q), contiguous.
    """
    tile, batch, head = _split_program(tl.cdiv(SEQ_Q, BLOCK_M), HEADS)
    first = tile * BLOCK_M
    out_ptr += batch * stride_ob + head * stride_oh
    dout_ptr += batch * stride_dob + head * stride_doh
    out = _load_rows(out_ptr, first, stride_om, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
    dout = _load_rows(dout_ptr, first, stride_dom, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D, MAY_OVERRUN=True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # (BLOCK_M,)
    rows = first + tl.arange(0, BLOCK_M)
    statistics = (batch * HEADS + head) * SEQ_Q + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + statistics, mask=rows < SEQ_Q, other=0.0)
    tl.store(delta_ptr + statistics, delta, mask=rows < SEQ_Q)


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
    scale_log2 = scale * LOG2_E
    dq = _accumulate_dq(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, first_row, 0, full_end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, False, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, first_row, full_end, end, stride_kn, stride_vn, SEQ_K,
        scale_log2, CAUSAL_OFFSET, HEAD_DIM, IS_CAUSAL, True, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, first_row, stride_dqm, SEQ_Q, HEAD_DIM, BLOCK_M, BLOCK_D)


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
    scale_log2 = scale * LOG2_E
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


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: str,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `attention_forward`, in the inputs' dtypes and, where dense, strides.

    Args:
        dout: gradient of out, any strides.
        dlse: gradient of lse, or None for zero.
        out, lse: what `attention_forward` returned.
        needs_dq, needs_dk, needs_dv: a gradient that is not needed is returned as an empty tensor.
        config: replaces the one chosen for the shape and device.
    """
    dq = empty_rows(q) if needs_dq else q.new_empty(0)
    dk = empty_rows(k) if needs_dk else k.new_empty(0)
    dv = empty_rows(v) if needs_dv else v.new_empty(0)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, out, dout = (rows_contiguous(t) for t in (q, k, v, out, dout))
    if config is None:
        config = select_attention_config(q.size(3), q.dtype, _target.target_of(q.device))
    with _target.launching_on(q):
        delta = _launch_delta(dout, dlse, out, config)
        if needs_dq:
            _launch_dq(dq, dout, q, k, v, lse, delta, scale, causal, config)
        for part_dk, part_dv in _dk_dv_launches(needs_dk, needs_dv, config):
            _launch_dk_dv(
                dk if part_dk else None,
                dv if part_dv else None,
                dout,
                q,
                k,
                v,
                lse,
                delta,
                scale,
                causal,
                config,
            )
    return dq, dk, dv


def _dk_dv_launches(needs_dk: bool, needs_dv: bool, config: AttentionConfig) -> list[tuple[bool, bool]]:
    """Which of dk and dv each launch computes."""
    if needs_dk and needs_dv and config.separate_dk_dv:
        return [(True, False), (False, True)]
    return [(needs_dk, needs_dv)] if needs_dk or needs_dv else []


def _launch_delta(dout: Tensor, dlse: Tensor | None, out: Tensor, config: AttentionConfig) -> Tensor:
    batch, heads, seq_q, head_dim = out.shape
    delta = torch.empty((batch, heads, seq_q), device=out.device, dtype=torch.float32)
    _attention_delta_kernel[(triton.cdiv(seq_q, config.delta.block_m) * heads * batch,)](
        out_ptr=out, dout_ptr=dout,
        dlse_ptr=delta if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        stride_ob=out.stride(0), stride_oh=out.stride(1), stride_om=out.stride(2),
        stride_dob=dout.stride(0), stride_doh=dout.stride(1), stride_dom=dout.stride(2),
        HEADS=heads, SEQ_Q=seq_q,
        HEAD_DIM=head_dim, HAS_DLSE=dlse is not None,
        BLOCK_M=config.delta.block_m, BLOCK_D=block_d(head_dim),
        num_warps=config.delta.num_warps,
    )  # fmt: skip
    return delta


def _launch_dq(
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
        scale=scale, CAUSAL_OFFSET=causal_offset(causal, seq_q, seq_k),
        HEAD_DIM=head_dim, IS_CAUSAL=causal != "none",
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d(head_dim),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _launch_dk_dv(
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
        scale=scale, CAUSAL_OFFSET=causal_offset(causal, seq_q, seq_k),
        HEAD_DIM=head_dim, IS_CAUSAL=causal != "none", NEEDS_DK=needs_dk, NEEDS_DV=needs_dv,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d(head_dim),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
