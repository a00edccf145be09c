"""Facts about the device a kernel is launched on, as functions; nothing is read at import."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """What launch configs depend on.

    Compared and hashed by identity, which costs no call of Python where a plan is looked up: each device has one.

    Attributes:
        backend: "cuda", "hip" or "interpreter".
        arch: compute capability as an integer for "cuda" (90 for sm_90), the gfx name for "hip", else 0.
        shared_memory: bytes of shared memory one program may use.
        multiprocessors: how many programs run at a time, at one each.
        l2: bytes of the cache that all multiprocessors share, or 0: where there are several, or they are not known.
    """

    backend: str
    arch: int | str
    shared_memory: int
    multiprocessors: int
    l2: int = 0

    @property
    def name(self) -> str:
        """The architecture: "sm_90", "gfx942", or "interpreter"."""
        if self.backend == "interpreter":
            return self.backend
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


INTERPRETER = Target("interpreter", 0, 1 << 30, 2, 1 << 16)

# Targets that kernels are compiled for without a device; the numbers are the vendors' own limits.
KNOWN_TARGETS = {
    "sm_75": Target("cuda", 75, 65_536, 40, 4 << 20),
    "sm_80": Target("cuda", 80, 166_912, 108, 40 << 20),
    "sm_86": Target("cuda", 86, 101_376, 84, 6 << 20),
    "sm_89": Target("cuda", 89, 101_376, 128, 72 << 20),
    "sm_90": Target("cuda", 90, 232_448, 132, 50 << 20),
    "sm_100": Target("cuda", 100, 232_448, 148, 126 << 20),
    "sm_120": Target("cuda", 120, 101_376, 170, 96 << 20),
    "gfx942": Target("hip", "gfx942", 65_536, 304),
}


def target_of(device: torch.device) -> Target:
    """The target a launch on this device is configured for."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return Target("hip", arch, properties.shared_memory_per_block, properties.multi_processor_count)
    return Target(
        "cuda",
        properties.major * 10 + properties.minor,
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
        properties.L2_cache_size,
    )


_NOTHING_TO_DO = nullcontext()


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, since Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING_TO_DO
