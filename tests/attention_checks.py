"""Runs attention forward and backward and holds every result against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


def results(
    case: AttentionCase, inputs: dict[str, Tensor], implementation: str, return_lse: bool = True
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the public function in the inputs' dtype; without lse where that is not returned."""
    q, k, v = (inputs[name].detach().requires_grad_() for name in ("q", "k", "v"))
    found = fastattn.attention(
        q, k, v, causal=case.causal, scale=case.scale, return_lse=return_lse, implementation=implementation
    )
    if not return_lse:
        return _named(found, None, torch.autograd.grad(found, (q, k, v), inputs["dout"]))
    out, lse = found
    # A fully masked row's lse is -inf; its gradient must not reach the inputs as NaN.
    dlse = inputs["dlse"].to(lse.dtype)
    return _named(out, lse, torch.autograd.grad((out, lse), (q, k, v), (inputs["dout"], dlse)))


def naive_results(
    case: AttentionCase, inputs: dict[str, Tensor], dtype: torch.dtype, return_lse: bool = True
) -> dict[str, Tensor]:
    """The same from the reference computed in this dtype."""
    q, k, v = (inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v"))
    out, lse = reference.attention(q, k, v, causal=case.causal, scale=case.scale, return_lse=True)
    loss = (out * inputs["dout"].to(dtype)).sum()
    if return_lse:
        # logsumexp's own derivative at a row of -inf is NaN; such a row's gradient is 0 by definition.
        finite = lse.isfinite()
        loss = loss + (torch.where(finite, lse, 0.0) * inputs["dlse"].to(lse.dtype)).sum()
    gradients = [g.nan_to_num(0.0) for g in torch.autograd.grad(loss, (q, k, v))]
    return _named(out, lse if return_lse else None, gradients)


def pytorch_results(case: AttentionCase, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The same from PyTorch's own operator, without lse; None where it has no path."""
    uneven = case.causal == "bottom_right" and case.seq_q != case.seq_k
    if uneven or (case.scale is not None and case.scale <= 0):  # it masks before it scales, on a CPU
        return None
    q, k, v = (inputs[name].detach().requires_grad_() for name in ("q", "k", "v"))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=bool(case.causal), scale=case.scale, enable_gqa=case.heads != case.kv_heads
    )
    return _named(out, None, torch.autograd.grad(out, (q, k, v), inputs["dout"]))


def _named(out: Tensor, lse: Tensor | None, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    found = dict(zip(RESULTS, (out, lse, *gradients), strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_attention_accurate(
    case: AttentionCase, inputs: dict[str, Tensor], actual: dict[str, Tensor], growth: float = 1.0
) -> None:
    """Holds every result against float64.

    The peer is PyTorch's operator in the same dtype, or where it has no path the naive maths (in float32 for lse).
    """
    truth = naive_results(case, inputs, torch.float64, "lse" in actual)
    peer = None if "lse" in actual else pytorch_results(case, inputs)
    if peer is None:
        peer = naive_results(case, inputs, case.dtype)
        peer["lse"] = naive_results(case, inputs, torch.promote_types(case.dtype, torch.float32))["lse"]
    lse = naive_results(case, inputs, torch.float64)["lse"]
    # Weights recomputed as exp(score - lse) carry lse's own rounding error, |lse| ulps of 1, which shows only where
    # nothing coarser hides it.
    wide = case.dtype in (torch.float32, torch.float64)
    recomputed = max(1.0, lse[lse.isfinite()].abs().max().item()) if wide and lse.isfinite().any() else 1.0
    # dq and dk are differences of terms as large as dv's, and 0 where a query sees one key.
    scale = truth["dv"].abs().max().item()
    for name in actual:
        # dk and dv are sums over the query heads of a group and over all their queries.
        terms = case.seq_q * case.heads // case.kv_heads if name in ("dk", "dv") else case.seq_k
        factor = 1.0 if name in ("out", "lse") else recomputed * math.sqrt(max(1.0, terms / 64))
        assert_accurate(
            actual[name],
            peer[name],
            truth[name],
            name=name,
            growth=growth * factor,
            scale=scale if name in ("dq", "dk") else 0.0,
        )


def check_attention(case: AttentionCase, implementation: str, device: torch.device) -> None:
    """With lse and its gradient, and without, which on a CPU are different ways to compute."""
    inputs = case.inputs(device)
    for return_lse in (True, False):
        assert_attention_accurate(case, inputs, results(case, inputs, implementation, return_lse))
