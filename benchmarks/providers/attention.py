"""Attention, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.providers.registry import Absent, Function, Provider, compiled, provider, refuse_interpreter
from fastattn import reference

_COMPILED_LENGTH = 1024


@provider("attention", "naive")
def attention_naive(case: AttentionCase, device: torch.device) -> Function:
    return lambda q, k, v: _tensor(reference.attention(q, k, v, causal=case.causal))


@provider("attention", "torch")
def attention_torch(case: AttentionCase, device: torch.device) -> Function:
    """PyTorch's own choice of back end; bottom-right alignment is its CausalBias, which its GPU back ends know."""
    _, heads, kv_heads, seq_q, seq_k, _ = case.shape
    mask: Tensor | None = None
    if case.causal == "bottom_right" and seq_q != seq_k:
        mask = causal_lower_right(seq_q, seq_k)
        if device.type != "cuda":
            mask = reference.causal_mask(seq_q, seq_k, case.causal, device)
    is_causal = bool(case.causal) and mask is None
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, enable_gqa=heads != kv_heads
    )


@provider("attention", "torch-compile")
def attention_compile(case: AttentionCase, device: torch.device) -> Function:
    """torch.compile of the naive formula; on a GPU at a training's usual length alone, as each case compiles anew."""
    if device.type == "cuda" and case.seq_q > _COMPILED_LENGTH:
        raise Absent(
            f"compiled at up to {_COMPILED_LENGTH:,} tokens only: each case takes as long as all others"
        )
    return compiled(attention_naive(case, device), device)


def _forced(backend: SDPBackend) -> Provider:
    def forced(case: AttentionCase, device: torch.device) -> Function:
        if device.type != "cuda":
            raise Absent(f"a GPU's back end; the device is {device.type}")
        function = attention_torch(case, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return function(q, k, v)

        return call

    return forced


provider("attention", "sdpa-flash")(_forced(SDPBackend.FLASH_ATTENTION))
provider("attention", "sdpa-efficient")(_forced(SDPBackend.EFFICIENT_ATTENTION))
provider("attention", "sdpa-cudnn")(_forced(SDPBackend.CUDNN_ATTENTION))
provider("attention", "sdpa-math")(_forced(SDPBackend.MATH))


def _attention_ours(implementation: str | None) -> Provider:
    def ours(case: AttentionCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        return lambda q, k, v: _tensor(
            fastattn.attention(q, k, v, causal=case.causal, implementation=implementation)
        )

    return ours


provider("attention", "fastattn")(_attention_ours(None))
provider("attention", "fastattn-triton")(_attention_ours("triton"))
provider("attention", "fastattn-torch")(_attention_ours("torch"))


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
