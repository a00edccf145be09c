"""Attention, backward: dq by tiles of queries, dk and dv by tiles of keys, each recomputing the weights.

With P the weights, S = scale * q k^T and O the output (FlashAttention-2, Dao, 2023, section 3.1.2):

    delta = rowsum(dO * O) - dlse       dP = dO V^T           dS = P * (dP - delta)
    dQ = scale * dS K                   dK = scale * dS^T Q   dV = P^T dO

dlse, the gradient of the log-sum-exp, enters through delta because d lse / d S = P. Two kernels behind that of delta
(attention_backward_dq, attention_backward_dk_dv), seven products and no atomics: the result is the same bit for bit
from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import AttentionConfig, select_attention_config
from fastattn.kernels._layout import block_d, empty_rows, rows_contiguous
from fastattn.kernels._tiles import _load_rows, _split_program
from fastattn.kernels.attention_backward_dk_dv import launch_dk_dv
from fastattn.kernels.attention_backward_dq import launch_dq


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q"])
def _attention_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    lse_ptr,
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
    """One program computes delta = rowsum(dO * O) - dlse of BLOCK_M rows of one head, 0 where a row sees no key.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,); dlse, lse and delta are (batch, HEADS, SEQ_Q), contiguous.
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
        # The gradient of a constant, -inf, may come in as NaN; times a weight of 0 it would spoil every key's.
        lse = tl.load(lse_ptr + statistics, mask=rows < SEQ_Q, other=0.0)
        delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + statistics, delta, mask=rows < SEQ_Q)


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
    lse = lse.contiguous()
    if config is None:
        config = select_attention_config(q.size(3), q.dtype, _target.target_of(q.device))
    with _target.launching_on(q):
        # dv alone reads no delta; any tensor can stand for its pointer.
        delta = _launch_delta(dout, dlse, out, lse, config) if needs_dq or needs_dk else lse
        if needs_dq:
            launch_dq(dq, dout, q, k, v, lse, delta, scale, causal, config)
        for part_dk, part_dv in _dk_dv_launches(needs_dk, needs_dv, config):
            launch_dk_dv(
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


def _launch_delta(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, config: AttentionConfig
) -> Tensor:
    batch, heads, seq_q, head_dim = out.shape
    delta = torch.empty((batch, heads, seq_q), device=out.device, dtype=torch.float32)
    _attention_delta_kernel[(triton.cdiv(seq_q, config.delta.block_m) * heads * batch,)](
        out_ptr=out, dout_ptr=dout,
        dlse_ptr=delta if dlse is None else dlse.contiguous(),
        lse_ptr=lse, delta_ptr=delta,
        stride_ob=out.stride(0), stride_oh=out.stride(1), stride_om=out.stride(2),
        stride_dob=dout.stride(0), stride_doh=dout.stride(1), stride_dom=dout.stride(2),
        HEADS=heads, SEQ_Q=seq_q,
        HEAD_DIM=head_dim, HAS_DLSE=dlse is not None,
        BLOCK_M=config.delta.block_m, BLOCK_D=block_d(head_dim),
        num_warps=config.delta.num_warps,
    )  # fmt: skip
    return delta
