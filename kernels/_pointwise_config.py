"""Launch configs of the elementwise kernels."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.kernels._target import Target


@dataclass(frozen=True)
class GeluConfig:
    """Launch config of both GELU kernels: elements a program computes, and its warps."""

    block: int
    num_warps: int


def select_gelu_config(target: Target) -> GeluConfig:
    """8 elements a thread: one 16-byte load in 16-bit types, two in float32."""
    return GeluConfig(block=1024, num_warps=2 if target.backend == "hip" else 4)
