"""Runs attention forward and backward and holds every result against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate, make_tensor

RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and options of one call."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    seq_q: int = 45
    seq_k: int = 67
    head_dim: int = 16
    causal: bool | str = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
        parts = [dtype[self.dtype], str(self.causal or "full")]
        parts += [f"b{self.batch}", f"h{self.heads}x{self.kv_heads}", f"q{self.seq_q}", f"k{self.seq_k}"]
        parts += [f"d{self.head_dim}"]
        return "-".join(parts if self.scale is None else [*parts, f"scale{self.scale}"])

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """q, k, v and the gradients dout, dlse that a backward is given."""
        q_shape = (self.batch, self.heads, self.seq_q, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.seq_k, self.head_dim)
        return {
            "q": make_tensor(*q_shape, dtype=self.dtype, device=device, seed=1),
            "k": make_tensor(*k_shape, dtype=self.dtype, device=device, seed=2),
            "v": make_tensor(*k_shape, dtype=self.dtype, device=device, seed=3),
            "dout": make_tensor(*q_shape, dtype=self.dtype, device=device, seed=4),
            "dlse": make_tensor(*q_shape[:3], device=device, seed=5),
        }


def results(case: AttentionCase, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the public function in the inputs' dtype."""
    q, k, v = (inputs[name].detach().requires_grad_() for name in ("q", "k", "v"))
    out, lse = fastattn.attention(
        q, k, v, causal=case.causal, scale=case.scale, return_lse=True, implementation=implementation
    )
    # A fully masked row's lse is -inf; its gradient must not reach the inputs as NaN.
    dlse = inputs["dlse"].to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (inputs["dout"], dlse))
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def naive_results(case: AttentionCase, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference computed in this dtype."""
    q, k, v = (inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v"))
    out, lse = reference.attention(q, k, v, causal=case.causal, scale=case.scale, return_lse=True)
    # logsumexp's own derivative at a row of -inf is NaN; such a row's gradient is 0 by definition.
    finite = lse.isfinite()
    weighted = torch.where(finite, lse, 0.0) * inputs["dlse"].to(lse.dtype)
    loss = (out * inputs["dout"].to(dtype)).sum() + weighted.sum()
    gradients = [g.nan_to_num(0.0) for g in torch.autograd.grad(loss, (q, k, v))]
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def assert_attention_accurate(
    case: AttentionCase, inputs: dict[str, Tensor], actual: dict[str, Tensor], growth: float = 1.0
) -> None:
    """Holds every result against float64; the peer is the naive maths in the same dtype (fp32 for lse)."""
    truth = naive_results(case, inputs, torch.float64)
    peer = naive_results(case, inputs, case.dtype)
    peer["lse"] = naive_results(case, inputs, torch.promote_types(case.dtype, torch.float32))["lse"]
    lse = truth["lse"]
    # Weights recomputed as exp(score - lse) carry lse's own rounding error, |lse| ulps of 1, which shows only where
    # nothing coarser hides it.
    wide = case.dtype in (torch.float32, torch.float64)
    recomputed = max(1.0, lse[lse.isfinite()].abs().max().item()) if wide and lse.isfinite().any() else 1.0
    for name in RESULTS:
        # dk and dv are sums over the query heads of a group and over all their queries.
        terms = case.seq_q * case.heads // case.kv_heads if name in ("dk", "dv") else case.seq_k
        factor = 1.0 if name in ("out", "lse") else recomputed * math.sqrt(max(1.0, terms / 64))
        assert_accurate(actual[name], peer[name], truth[name], name=name, growth=growth * factor)


def check_attention(case: AttentionCase, implementation: str, device: torch.device) -> None:
    inputs = case.inputs(device)
    assert_attention_accurate(case, inputs, results(case, inputs, implementation))
