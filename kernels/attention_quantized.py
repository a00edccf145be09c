"""Attention's forward on e4m3 operands, which it makes of q, k and v: for inference, as it has no backward.

The kernel is `attention_forward`'s; see `quantize` for what is made before, and `_quantized` for what differs in it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Quantized, rows_of, score_of, sequences_of, window_of
from fastattn.kernels._attention_config import AttentionConfig, score_load, select_attention_config
from fastattn.kernels._layout import block_d, empty_out, rows_contiguous
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels.attention_forward import _attention_forward_kernel, attention_forward
from fastattn.kernels.quantize import quantize_operands


def attention_e4m3_forward(
    q: Tensor, k: Tensor, v: Tensor, *options: object, config: AttentionConfig | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of `fastattn.attention` with `quantize="e4m3"`.

    Args:
        q, k, v: as `attention_forward` takes them, head_dim and v_dim up to 256.
        options: the fields of `AttentionOptions`; no packed sequences and no dropout.
        config: replaces the one chosen for the shape and device.

    Returns:
        out (batch, heads, seq_q, v_dim) in q's dtype, and lse (batch, heads, seq_q), float32, natural logarithm.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k, v_dim = v.size(1), v.size(2), v.size(3)
    if q.numel() == 0 or v.numel() == 0:
        return attention_forward(q, k, v, *options)  # whose values are known without a product
    out = empty_out(q, v)
    lse = torch.empty((batch, heads, seq_q), device=q.device, dtype=torch.float32)
    if config is None:
        target, load = _target.target_of(q.device), score_load(asked)
        config = select_attention_config(max(head_dim, v_dim), torch.float8_e4m3fn, target, load)
    tiles = config.forward
    made = quantize_operands(
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), asked.key_lengths, tiles.block_n
    )
    width, grid = made.q.size(3), (triton.cdiv(seq_q, tiles.block_m) * heads * batch,)
    with _target.launching_on(q):
        _attention_forward_kernel[grid](
            q=rows_of(made.q), k=rows_of(made.k), v=rows_of(made.v), out=rows_of(out), lse_ptr=lse,
            score=score_of(asked, q)._replace(quantized=Quantized(made.terms, made.statistics)),
            sequences=sequences_of(asked), sinks_ptr=None if asked.sinks is None else asked.sinks.contiguous(),
            HEADS=heads, GROUPS=heads // kv_heads, SEQ_Q=seq_q, SEQ_K=seq_k, MAX_SEQ_Q=seq_q, MAX_SEQ_K=seq_k,
            **window_of(asked),
            HEAD_DIM=width, V_DIM=v_dim,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            BLOCK_D=block_d(width, least=32), BLOCK_V=block_d(v_dim, least=32),
            **tiles.loop, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse
