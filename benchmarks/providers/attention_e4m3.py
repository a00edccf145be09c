"""Attention on operands rounded to e4m3, beside the same call without: what rounding saves, its own time counted."""

from __future__ import annotations

import torch

import fastattn
from benchmarks.cases.attention_e4m3 import AttentionE4M3Case
from benchmarks.providers.attention import attention_naive, attention_torch
from benchmarks.providers.registry import Function, Provider, provider, refuse_interpreter

provider("attention_e4m3", "naive")(attention_naive)
provider("attention_e4m3", "torch")(attention_torch)


def _ours(quantize: str | None) -> Provider:
    def ours(case: AttentionE4M3Case, device: torch.device) -> Function:
        refuse_interpreter(device)
        return lambda q, k, v: fastattn.attention(q, k, v, causal=case.causal, quantize=quantize)

    return ours


provider("attention_e4m3", "fastattn-16-bit")(_ours(None))
provider("attention_e4m3", "fastattn")(_ours("e4m3"))
