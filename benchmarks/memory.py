"""How much memory a call needs: the peak of its tensors above what was there before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Kineto announces each profile on stderr; above its last level it is silent. It reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_memory(call: Callable[[], Any], device: torch.device | str) -> int:
    """Peak bytes of the tensors that one call allocates, above what was allocated before it.

    On a GPU this is the caching allocator's own count. On a CPU it is exact too: PyTorch's profiler reports
    each allocation and release of its allocator, and the largest running sum is the peak. What a library
    allocates past PyTorch's allocator (a thread's scratch, say) is in neither.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # garbage released during the call would hide as much of its allocations
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in _kineto_events(profiled)
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return _peak(size for _, size in sorted(changes, key=lambda change: change[0]))


def _kineto_events(profiled: profile) -> Iterable[Any]:
    inner = profiled.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("PyTorch's profiler kept no events; memory cannot be measured on this build")
    return inner.kineto_results.events()


def _peak(changes: Iterable[int]) -> int:
    current = peak = 0
    for change in changes:
        current += change
        peak = max(peak, current)
    return peak


def held_by(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
