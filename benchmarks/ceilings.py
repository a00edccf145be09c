"""What a device reaches at best: the copy and the matrix product that rows are held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, figures, release
from benchmarks.timing import Timer, interleave, make_timer


def measure_ceilings(device: torch.device, rounds: int, timer: Timer | None = None) -> Iterator[Row]:
    """The rate of a large copy, and of a large matrix product of random values in each dtype that is measured."""
    timer = timer or make_timer(device)
    row = {"operation": "ceiling", "direction": "forward", "provider": "torch", "status": "ok"}
    yield row | _copy(device, rounds, timer)
    if device.type == "cuda":
        yield row | _product("matmul", 8192, torch.bfloat16, device, rounds, timer)
        yield row | _product("matmul-fp32", 8192, torch.float32, device, rounds, timer)
    else:
        yield row | _product("matmul", 1024, torch.float32, device, rounds, timer)
    release(device)


def _copy(device: torch.device, rounds: int, timer: Timer) -> Row:
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = figures("copy", interleave({"copy": lambda: target.copy_(source)}, timer, rounds))
    return {"case": "copy", **found, "gbytes_per_s": 2 * size / found["median_ms"] / 1e6}


def _product(
    case: str, side: int, dtype: torch.dtype, device: torch.device, rounds: int, timer: Timer
) -> Row:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = figures(case, interleave({case: lambda: a @ b}, timer, rounds))
    return {"case": case, **found, "tflops": 2 * side**3 / found["median_ms"] / 1e9}
