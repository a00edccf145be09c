"""Attention's forward on e4m3 operands, which it makes of q, k and v: for inference, as it has no backward.

The kernel is `attention_forward`'s; see `quantize` for what is made before, and `_quantized` for what differs in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Quantized, rows_of, score_of, sequences_of
from fastattn.kernels._attention_config import score_load
from fastattn.kernels._attention_grid import may_fold
from fastattn.kernels._attention_plan import forward_plan, reach_of
from fastattn.kernels._attention_tables import AttentionConfig
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import block_d, empty_out, rows_contiguous
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels.attention_combine import attention_combine, empty_parts
from fastattn.kernels.attention_forward import _attention_forward_kernel, attention_forward
from fastattn.kernels.quantize import padded_width, quantize_operands


def attention_e4m3_forward(
    q: Tensor, k: Tensor, v: Tensor, *options: object, config: AttentionConfig | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of `fastattn.attention` with `quantize="e4m3"`.

    Args:
        q, k, v: as `attention_forward` takes them, head_dim and v_dim up to 256.
        options: the fields of `AttentionOptions`; no dropout.
        config: replaces the one chosen for the shape and device, also where queries are few.

    Returns:
        out (batch, heads, seq_q, v_dim) in q's dtype, and lse (batch, heads, seq_q), float32, natural logarithm.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    if q.numel() == 0 or v.numel() == 0 or asked.longest_k(k.size(2)) == 0:
        return attention_forward(q, k, v, *options)  # whose values are known without a product
    v_dim, width = v.size(3), padded_width(q.size(3))
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if asked.cu_seqlens_q is not None:  # rows of no sequence are no program's
        out.zero_()
        lse.fill_(float("-inf"))
    plan = forward_plan(
        (*q.shape[:3], width), v.shape, (), torch.float8_e4m3fn, score_load(asked), reach_of(asked, q, k), config,
        _target.target_of(q.device), may_fold(asked),
    )  # fmt: skip
    tiles, grid, constants = plan.forward
    if grid[0] == 0:
        return out, lse
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    made = quantize_operands(q, k, v, asked, tiles.block_n)
    blocks: dict[str, Any] = {"BLOCK_D": block_d(width, least=32), "BLOCK_V": block_d(v_dim, least=32)}
    quantized = Quantized(made.k_scales, made.terms, made.statistics)
    sinks, combine = None if asked.sinks is None else asked.sinks.contiguous(), plan.combine
    parts = None if combine is None else empty_parts(out, grid[1])
    with _target.launching_on(q):
        launch(
            _attention_forward_kernel,
            grid,
            constants,
            q=rows_of(made.q),
            k=rows_of(made.k),
            v=rows_of(made.v),
            out=rows_of(out if parts is None else parts[0]),
            lse_ptr=lse if parts is None else parts[1],
            score=score_of(asked, q)._replace(quantized=quantized),
            sequences=sequences_of(asked),
            sinks_ptr=sinks if parts is None else None,
            SEQ_K=k.size(2),
            MAX_SEQ_K=asked.longest_k(k.size(2)),
            **blocks,
        )
        if parts is not None and combine is not None:
            attention_combine(*parts, out, lse, sinks, asked, combine)
    return out, lse
