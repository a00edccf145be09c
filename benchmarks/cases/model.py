"""Parts of models, and whole ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn.models.blocks import PreNormBlock
from fastattn.models.config import BlockConfig


@dataclass(frozen=True)
class BlockCase:
    """One pre-norm Transformer block, causal, on (batch, seq_len, width); its parameters are inputs."""

    batch: int
    seq_len: int
    width: int
    heads: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "block"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-b{self.batch}-s{self.seq_len}-w{self.width}-h{self.heads}"

    def block(self, implementation: str, device: torch.device | str) -> PreNormBlock:
        """The same weights for every implementation."""
        torch.manual_seed(0)
        config = BlockConfig(d_model=self.width, n_heads=self.heads, implementation=implementation)
        return PreNormBlock(config, causal=True).to(device, self.dtype)

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        x = draw(self.batch, self.seq_len, self.width, dtype=self.dtype, device=device, requires_grad=True)
        return (x, *self.block("naive", device).parameters())

    def reference(self, *tensors: Tensor) -> Tensor:
        return call_block(self.block("naive", "meta"), *tensors)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


def call_block(block: PreNormBlock, x: Tensor, *parameters: Tensor) -> Tensor:
    """The block with these parameters in the place of its own, and the sum that it leaves to the next one."""
    names = (name for name, _ in block.named_parameters())
    stream, branch = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
    return stream + branch


@dataclass(frozen=True)
class GptCase:
    """One training step of a GPT on (batch, seq_len) tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    seq_len: int

    operation: ClassVar[str] = "gpt"

    @property
    def name(self) -> str:
        return f"L{self.layers}-w{self.width}-h{self.heads}-v{self.vocabulary}-b{self.batch}-s{self.seq_len}"
