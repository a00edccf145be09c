"""What the functions that choose launch configs share. Configs are frozen data, chosen from shape, dtype and target."""

from __future__ import annotations

import torch

from fastattn.kernels._target import Target


def loads_are_wide(alignment: int, dtype: torch.dtype) -> bool:
    """Whether a thread can load 8 bytes or more at a time."""
    return alignment * dtype.itemsize >= 8


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below size."""
    return 1 << (size - 1).bit_length()


def warps_of(count: int, target: Target) -> int:
    """Warps of 32 threads, as this target's number of warps: AMD's hold 64."""
    return count // 2 if target.backend == "hip" else count
