"""Attention, backward: dq by tiles of queries, dk and dv by tiles of keys, each recomputing the weights.

With P the weights, S = scale * q k^T and O the output (FlashAttention-2, Dao, 2023, section 3.1.2):

    delta = rowsum(dO * O) - dlse       dP = dO V^T           dS = P * (dP - delta)
    dQ = scale * dS K                   dK = scale * dS^T Q   dV = P^T dO

dlse, the gradient of the log-sum-exp, enters through delta because d lse / d S = P. Dropout multiplies P in dV and dP
itself by the same mask; a soft cap multiplies dS by its derivative in dQ and dK; a bias's gradient is dS; a sink, a key
of value 0 and weight exp(sink - lse), has the gradient -sum exp(sink - lse) delta.

A kernel each for delta, dq, dk with dv, and dbias (attention_backward_*), with seven products, nine with a bias, and
no atomics: the result is the same bit for bit from run to run. A config with `reduce_dq`, which no table holds, has the
programs of dk add dq up by atomics instead (FlashAttention-2's order of loops): five products, and no bits to rely on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import _in_elements, rows_of, score_of
from fastattn.kernels._attention_config import score_load
from fastattn.kernels._attention_forms import (
    dk_dv_warp_groups_reason,
    dq_warp_groups_reason,
    layout_reason,
)
from fastattn.kernels._attention_plan import AttentionLaunch, backward_plan, reach_of, read_in_place
from fastattn.kernels._attention_tables import AttentionConfig
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_gradient
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._tiles import _load_rows, _split_program
from fastattn.kernels.attention_backward_dbias import launch_dbias
from fastattn.kernels.attention_backward_dk_dv import launch_dk_dv
from fastattn.kernels.attention_backward_dq import launch_dq


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q"])
def _attention_delta_kernel(
    out,
    dout,
    dlse_ptr,
    lse_ptr,
    delta_ptr,
    HEADS,
    SEQ_Q,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program computes delta = rowsum(dO * O) - dlse of BLOCK_M rows of one head, 0 where a row sees no key.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,); dlse (or None), lse and delta are (batch, HEADS, SEQ_Q), contiguous.
    """
    out, dout = _in_elements(out), _in_elements(dout)
    tile, batch, head = _split_program(tl.cdiv(SEQ_Q, BLOCK_M), HEADS)
    first = tile * BLOCK_M
    out_ptr = out.ptr + batch * out.stride_b + head * out.stride_h
    dout_ptr = dout.ptr + batch * dout.stride_b + head * dout.stride_h
    result = _load_rows(out_ptr, first, out.stride_m, SEQ_Q, V_DIM, BLOCK_M, BLOCK_V, MAY_OVERRUN=True)
    grad = _load_rows(dout_ptr, first, dout.stride_m, SEQ_Q, V_DIM, BLOCK_M, BLOCK_V, MAY_OVERRUN=True)
    delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)  # (BLOCK_M,)
    rows = first + tl.arange(0, BLOCK_M)
    statistics = (batch * HEADS + head) * SEQ_Q + rows
    if dlse_ptr is not None:
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
    needs: Sequence[bool],
    *options: object,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsinks of `attention_forward`, in the inputs' dtypes and, where dense, strides.

    Args:
        dout: gradient of out, any strides.
        dlse: gradient of lse, or None for zero.
        out, lse: what `attention_forward` returned.
        needs: which of the five are needed; one that is not is returned as an empty tensor.
        options: the fields of `AttentionOptions`.
        config: replaces the one chosen for the shape and device; see `fitting_config` for one with descriptors.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    given = (q, k, v, asked.bias, asked.sinks)
    dq, dk, dv, dbias, dsinks = results = tuple(
        empty_gradient(tensor) if needed and tensor is not None else q.new_empty(0)
        for tensor, needed in zip(given, needs, strict=True)
    )
    packed = asked.cu_seqlens_q is not None
    if packed or q.numel() == 0 or v.numel() == 0:
        for gradient in results:
            gradient.zero_()  # rows of no sequence are no program's
        if not packed and asked.sinks is None:
            return dq, dk, dv, dbias, dsinks
    if q.numel() == 0 or asked.sequences(q.size(0)) == 0:
        return dq, dk, dv, dbias, dsinks
    tensors = q, k, v, out, dout
    layout = (
        q.shape, v.shape, tuple([tensor.stride() for tensor in tensors]), q.dtype, score_load(asked),
        reach_of(asked, q, k), config, _target.target_of(q.device),
    )  # fmt: skip
    plan = backward_plan(*layout)
    q, k, v, out, dout = read_in_place(tensors, plan.in_place)
    if plan.descriptors and layout_reason((q, k, v, dout), asked) is not None:
        plan = backward_plan(*layout, described=False)
    lse = lse.contiguous()
    if plan.dq.tiles.form == "warp_groups" and dq_warp_groups_reason(_target.target_of(q.device)) is not None:
        plan = backward_plan(*layout, described=False)
    for tiles in (plan.dk_dv.tiles, plan.dv.tiles):
        if tiles.form == "warp_groups":
            target = _target.target_of(q.device)
            if dk_dv_warp_groups_reason(lse, tiles.block_m, target) is not None:
                plan = backward_plan(*layout, described=False)
                break
    dq_sum = _zeros_like_rows(q) if _adds_up_dq(needs, asked, plan.reduce_dq) else None
    with _target.launching_on(q):
        # dv alone reads no delta; any tensor can stand for its pointer.
        needs_delta = needs[0] or needs[1] or needs[3] or needs[4]
        delta = _launch_delta(dout, dlse, out, lse, plan.delta) if needs_delta else lse
        common = (dout, q, k, v, lse, delta, asked, score_of(asked, q))
        if needs[0] and dq_sum is None and plan.dq.grid[0] > 0:
            launch_dq(dq, *common, plan.dq)
        if plan.dk_dv.grid[0] > 0:
            for part_dk, part_dv in _dk_dv_launches(needs[1], needs[2], plan.separate_dk_dv):
                launch_dk_dv(
                    dk if part_dk else None,
                    dv if part_dv else None,
                    dq_sum if part_dk else None,
                    *common,
                    plan.dk_dv if part_dk else plan.dv,
                )
        if dq_sum is not None:
            torch.mul(dq_sum, asked.scale, out=dq)
        if dbias.numel() > 0:
            launch_dbias(dbias, *common, plan.dbias)
    if needs[4] and asked.sinks is not None:
        dsinks.copy_(sinks_gradient(asked.sinks, lse, delta))
    return dq, dk, dv, dbias, dsinks


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sink - lse) delta over batch and rows, (heads,); a row of no sequence, whose lse is -inf, has none."""
    weights = torch.exp(sinks.to(lse.dtype).view(-1, 1) - lse.masked_fill(lse == float("-inf"), float("inf")))
    return -(weights * delta).sum(dim=(0, 2))


def _adds_up_dq(needs: Sequence[bool], asked: AttentionOptions, reduce_dq: bool) -> bool:
    """Whether dq is added up by atomics beside dk; alone it takes fewer products in its own kernel."""
    if not (reduce_dq and needs[0] and needs[1]):
        return False
    return not (asked.deterministic or torch.are_deterministic_algorithms_enabled())


def _zeros_like_rows(q: Tensor) -> Tensor:
    """Float32 rows to add q's gradient up in, 16 bytes or a multiple apart, as descriptors need them."""
    head_dim = q.size(3)
    return q.new_zeros((*q.shape[:3], ceil_div(head_dim, 4) * 4), dtype=torch.float32)[..., :head_dim]


def _dk_dv_launches(needs_dk: bool, needs_dv: bool, separate: bool) -> list[tuple[bool, bool]]:
    """Which of dk and dv each launch computes."""
    if needs_dk and needs_dv and separate:
        return [(True, False), (False, True)]
    return [(needs_dk, needs_dv)] if needs_dk or needs_dv else []


def _launch_delta(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, plan: AttentionLaunch
) -> Tensor:
    delta = torch.empty_like(lse)
    launch(
        _attention_delta_kernel,
        plan.grid,
        plan.constants,
        out=rows_of(out),
        dout=rows_of(dout),
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        lse_ptr=lse,
        delta_ptr=delta,
    )
    return delta
