"""Which cases are measured: one suite for each part of a Transformer, sized for a CPU or for a GPU.

The most telling cases of a suite come first, so that an interrupted run has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases import (
    AddLayerNormCase,
    AddRMSNormCase,
    AttentionCase,
    AttentionE4M3Case,
    BiasGeluCase,
    BlockCase,
    GegluCase,
    GeluCase,
    GptCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    MlpCase,
    OpCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.cases.attention_options import OPTIONS

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Suite:
    """Cases under one name, and what is timed of each: "forward", without a graph, and with every gradient."""

    name: str
    title: str
    cpu: Sequence[OpCase]
    gpu: Sequence[OpCase]
    directions: tuple[str, ...] = (FORWARD, BOTH)

    def cases(self, device: torch.device | str) -> Sequence[OpCase]:
        return self.gpu if torch.device(device).type == "cuda" else self.cpu


_BF16 = torch.bfloat16


def _attention(seq: int, head_dim: int, causal: str | bool = "top_left", **others: object) -> AttentionCase:
    """About 16k tokens and 2,048 features a case, as in training."""
    heads, batch = 2048 // head_dim, max(1, 16384 // seq)
    return AttentionCase(batch, heads, seq, head_dim, causal=causal, dtype=_BF16, **others)  # type: ignore[arg-type]


# Each option alone, and together what a large model of today has.
_OPTIONS = (*OPTIONS, "window+softcap+sinks")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "attention",
            "softmax attention",
            # Small enough for two cores; 1,024 tokens is where naive attention's quadratic memory begins to show.
            cpu=(
                AttentionCase(1, 4, 1024, 64, causal="top_left"),
                AttentionCase(1, 4, 256, 64),
                AttentionCase(2, 8, 127, 64, kv_heads=2, seq_k=333, causal="bottom_right"),
            ),
            gpu=(
                _attention(4096, 128),
                _attention(4096, 64),
                _attention(16384, 128),
                _attention(1024, 128),
                _attention(4096, 128, False),
                _attention(4096, 256),
                _attention(4096, 128, kv_heads=4),
                _attention(16384, 64),
                _attention(1024, 64),
                _attention(4096, 64, False),
                AttentionCase(4, 16, 1024, 128, seq_k=4096, causal="bottom_right", dtype=_BF16),
                _attention(4096, 96),
                AttentionCase(4, 16, 4096, 64, causal="top_left", dtype=torch.float16),
                _attention(32768, 128),
            ),
        ),
        Suite(
            "e4m3",
            "attention on operands rounded to e4m3, for inference",
            cpu=(AttentionE4M3Case(1, 4, 1024, 64, causal="top_left"),),
            gpu=(
                AttentionE4M3Case(4, 16, 4096, 128, causal="top_left", dtype=_BF16),
                AttentionE4M3Case(1, 16, 16384, 128, causal="top_left", dtype=_BF16),
                AttentionE4M3Case(4, 16, 4096, 128, dtype=_BF16),
                AttentionE4M3Case(4, 32, 4096, 64, causal="top_left", dtype=_BF16),
                AttentionE4M3Case(4, 8, 4096, 256, causal="top_left", dtype=_BF16),
            ),
            directions=(FORWARD,),
        ),
        Suite(
            "options",
            "what attention's options cost, over the same call without them",
            cpu=tuple(AttentionCase(2, 4, 512, 64, causal="top_left", options=name) for name in _OPTIONS),
            # Not larger, as gradients that add up over the batch are checked against all of it in float64.
            gpu=tuple(
                AttentionCase(2, 8, 4096, 128, causal="top_left", dtype=_BF16, options=name)
                for name in _OPTIONS
            ),
        ),
        Suite(
            "norm",
            "LayerNorm and RMSNorm, alone and behind a residual sum",
            cpu=(
                LayerNormCase(1024, 256),
                LayerNormCase(333, 8192),
                RMSNormCase(1024, 256),
                AddLayerNormCase(1024, 256),
                AddRMSNormCase(1024, 256),
            ),
            gpu=(
                LayerNormCase(16384, 4096, dtype=_BF16),
                AddLayerNormCase(16384, 4096, _BF16),
                RMSNormCase(16384, 4096, dtype=_BF16),
                LayerNormCase(16384, 768, dtype=_BF16),
                LayerNormCase(16384, 8192, dtype=_BF16),
                LayerNormCase(4096, 65536, dtype=_BF16),
                LayerNormCase(16384, 4096),
                LayerNormCase(4096, 1024, dtype=_BF16),
                LayerNormCase(8192, 1024, dtype=_BF16),
                LayerNormCase(8192, 16384, dtype=_BF16),
                AddLayerNormCase(16384, 1024, _BF16),
                AddRMSNormCase(16384, 4096, _BF16),
                AddLayerNormCase(16384, 4096, _BF16, torch.float32),
            ),
        ),
        Suite(
            "mlp",
            "GELU, and the MLP around it",
            cpu=(
                GeluCase(1024, 4096),
                GeluCase(1024, 4096, "tanh"),
                MlpCase(512, 256, 1024),
                BiasGeluCase(1024, 1024),
                GegluCase(1024, 1024),
                SwigluCase(1024, 1024),
            ),
            gpu=(
                GeluCase(16384, 16384, dtype=_BF16),
                MlpCase(16384, 4096, 16384, dtype=_BF16),
                GeluCase(16384, 3072, dtype=_BF16),
                GeluCase(16384, 16384, "tanh", dtype=_BF16),
                MlpCase(16384, 768, 3072, "none", dtype=_BF16),
                BiasGeluCase(16384, 3072, dtype=_BF16),
                GegluCase(16384, 11008, dtype=_BF16),
                GegluCase(16384, 11008, "tanh", dtype=_BF16),
                SwigluCase(16384, 11008, dtype=_BF16),
                MlpCase(16384, 1024, 4096, "none", dtype=_BF16),
                MlpCase(16384, 2048, 8192, "none", dtype=_BF16),
            ),
        ),
        Suite(
            "rotary",
            "rotary position embeddings",
            cpu=(RotaryCase(1, 8, 1024, 64), RotaryCase(1, 8, 1024, 64, interleaved=True)),
            gpu=(
                RotaryCase(4, 32, 4096, 128, dtype=_BF16),
                RotaryCase(4, 32, 4096, 128, interleaved=True, dtype=_BF16),
                RotaryCase(16, 16, 1024, 64, dtype=_BF16),
            ),
        ),
        Suite(
            "loss",
            "cross-entropy, and the linear layer before it",
            cpu=(
                LossCase(512, 8192),
                LinearLossCase(512, 256, 32768),
                LinearLossCase(512, 256, 32768, _BF16),
            ),
            gpu=(
                LossCase(8192, 50304, dtype=_BF16),
                LinearLossCase(8192, 768, 50304, dtype=_BF16),
                LossCase(4096, 131072, dtype=_BF16),
                LinearLossCase(8192, 4096, 131072, dtype=_BF16),
                LossCase(8192, 50257, dtype=_BF16),
            ),
        ),
        Suite(
            "block",
            "a Transformer block",
            cpu=(BlockCase(1, 512, 192, 3),),
            gpu=(BlockCase(4, 4096, 2048, 16, dtype=_BF16), BlockCase(16, 1024, 768, 12, dtype=_BF16)),
            directions=(BOTH,),
        ),
        Suite(
            "decode",
            "one query, or a few, against many keys",
            cpu=(AttentionCase(1, 8, 1, 64, kv_heads=2, seq_k=2048),),
            gpu=(
                AttentionCase(16, 32, 1, 128, kv_heads=8, seq_k=8192, dtype=_BF16),
                AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=32768, dtype=_BF16),
                AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=8192, dtype=_BF16),
                AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=65536, dtype=_BF16),
                AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=131072, dtype=_BF16),
                AttentionCase(4, 32, 1, 64, kv_heads=8, seq_k=32768, dtype=_BF16),
                # All heads share one key head; a few drafted tokens at once.
                AttentionCase(8, 32, 1, 128, kv_heads=1, seq_k=32768, dtype=_BF16),
                AttentionCase(4, 32, 4, 128, kv_heads=8, seq_k=32768, causal="bottom_right", dtype=_BF16),
            ),
            directions=(FORWARD,),
        ),
    )
}

# A whole training step, which benchmarks/training_step.py measures.
TRAINING_STEPS = {
    "cpu": (GptCase(layers=2, width=128, heads=4, vocabulary=256, batch=1, seq_len=512),),
    "cuda": (GptCase(layers=12, width=768, heads=12, vocabulary=50304, batch=8, seq_len=1024),),
}


def operation_cases(operation: str, device: torch.device | str) -> tuple[OpCase, ...]:
    """The cases of an operation in all suites, sized for the device."""
    return tuple(c for suite in SUITES.values() for c in suite.cases(device) if c.operation == operation)
