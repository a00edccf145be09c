"""What is measured: frozen shapes for each operation, one set for a CPU and one for a GPU.

A case knows its name (for tables and test ids) and makes its own inputs, so that every provider gets the same
values in the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.testing import make_tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class AttentionCase:
    """softmax(q k^T) v with q (batch, heads, seq_q, head_dim) and k, v (batch, kv_heads, seq_k, head_dim)."""

    batch: int
    heads: int
    seq_q: int
    head_dim: int
    kv_heads: int | None = None
    seq_k: int | None = None
    causal: str | bool = False
    dtype: torch.dtype = torch.float32

    operation = "attention"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(batch, heads, kv_heads, seq_q, seq_k, head_dim), with the defaults filled in."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        seq_k = self.seq_q if self.seq_k is None else self.seq_k
        return self.batch, self.heads, kv_heads, self.seq_q, seq_k, self.head_dim

    @property
    def name(self) -> str:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        mask = str(self.causal).replace("_", "-") if self.causal else "full"
        groups = f"h{heads}" if heads == kv_heads else f"h{heads}kv{kv_heads}"
        lengths = f"s{seq_q}" if seq_q == seq_k else f"q{seq_q}k{seq_k}"
        return f"{DTYPE_NAMES[self.dtype]}-{mask}-b{batch}{groups}-{lengths}-d{head_dim}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        sizes = ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))
        return tuple(
            make_tensor(batch, h, s, head_dim, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, (h, s) in enumerate(sizes)
        )


@dataclass(frozen=True)
class LayerNormCase:
    """LayerNorm over the last dimension of x (rows, width)."""

    rows: int
    width: int
    affine: bool = True
    dtype: torch.dtype = torch.float32

    operation = "layer_norm"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}" + ("" if self.affine else "-plain")

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        shapes = ((self.rows, self.width), (self.width,), (self.width,))[: 3 if self.affine else 1]
        return tuple(
            make_tensor(*shape, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, shape in enumerate(shapes)
        )


@dataclass(frozen=True)
class GeluCase:
    """GELU of x (rows, width)."""

    rows: int
    width: int
    approximate: str = "none"
    dtype: torch.dtype = torch.float32

    operation = "gelu"

    @property
    def name(self) -> str:
        form = "erf" if self.approximate == "none" else self.approximate
        return f"{DTYPE_NAMES[self.dtype]}-{form}-{self.rows}x{self.width}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (make_tensor(self.rows, self.width, dtype=self.dtype, device=device, requires_grad=True),)


@dataclass(frozen=True)
class GptCase:
    """One training step of a GPT on (batch, seq_len) tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    seq_len: int

    operation = "gpt"

    @property
    def name(self) -> str:
        return f"L{self.layers}-w{self.width}-h{self.heads}-v{self.vocabulary}-b{self.batch}-s{self.seq_len}"


OpCase = AttentionCase | LayerNormCase | GeluCase

# Small enough that every provider, forward and backward, fits in a few minutes on two cores; odd sizes and
# grouped heads stay in. 1,024 tokens is where naive attention's quadratic memory begins to show.
ATTENTION_CPU = (
    AttentionCase(1, 4, 256, 64),
    AttentionCase(1, 4, 1024, 64, causal="top_left"),
    AttentionCase(2, 8, 127, 64, kv_heads=2, seq_k=333, causal="bottom_right"),
)
LAYER_NORM_CPU = (LayerNormCase(1024, 256), LayerNormCase(333, 8192))
GELU_CPU = (GeluCase(1024, 1024), GeluCase(1024, 4096), GeluCase(1024, 4096, approximate="tanh"))
GPT_CPU = (GptCase(layers=2, width=128, heads=4, vocabulary=256, batch=1, seq_len=512),)

# About 16k tokens a case, as in training; the longest sequence is where memory decides.
_BF16 = torch.bfloat16
ATTENTION_GPU = (
    *(AttentionCase(16384 // s, 16, s, 64, causal="top_left", dtype=_BF16) for s in (1024, 4096, 16384)),
    *(AttentionCase(16384 // s, 16, s, 128, causal="top_left", dtype=_BF16) for s in (1024, 4096, 16384)),
    AttentionCase(4, 16, 4096, 64, dtype=_BF16),
    AttentionCase(4, 16, 4096, 128, dtype=_BF16),
    AttentionCase(4, 32, 4096, 128, kv_heads=8, causal="top_left", dtype=_BF16),
    AttentionCase(4, 16, 1024, 128, seq_k=4096, causal="bottom_right", dtype=_BF16),
    AttentionCase(4, 16, 4096, 96, causal="top_left", dtype=_BF16),
    AttentionCase(4, 16, 4096, 64, causal="top_left", dtype=torch.float16),
)
LAYER_NORM_GPU = (
    LayerNormCase(16384, 768, dtype=_BF16),
    LayerNormCase(16384, 4096, dtype=_BF16),
    LayerNormCase(16384, 8192, dtype=_BF16),
    LayerNormCase(4096, 65536, dtype=_BF16),
    LayerNormCase(16384, 4096),
)
GELU_GPU = (
    GeluCase(16384, 3072, dtype=_BF16),
    GeluCase(16384, 16384, dtype=_BF16),
    GeluCase(16384, 16384, approximate="tanh", dtype=_BF16),
)
GPT_GPU = (GptCase(layers=12, width=768, heads=12, vocabulary=50304, batch=8, seq_len=1024),)


def operation_cases(operation: str, device: torch.device | str) -> tuple[OpCase, ...]:
    """The cases of "attention", "layer_norm" or "gelu" sized for the device."""
    on_gpu = torch.device(device).type == "cuda"
    cases: dict[str, tuple[OpCase, ...]] = {
        "attention": ATTENTION_GPU if on_gpu else ATTENTION_CPU,
        "layer_norm": LAYER_NORM_GPU if on_gpu else LAYER_NORM_CPU,
        "gelu": GELU_GPU if on_gpu else GELU_CPU,
    }
    return cases[operation]
