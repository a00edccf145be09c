"""Launch configs of the product with an activation, and which path an MLP takes.

Pure functions of shape, dtype and target, so that they are tested without a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from fastattn.kernels._config import tunable
from fastattn.kernels._target import Target


@dataclass(frozen=True)
class LinearConfig:
    """Launch config of the product with an activation.

    Attributes:
        block_m, block_n, block_k: rows, columns and depth of a tile.
        group_m: row tiles that programs share the columns of, for the L2 cache.
        num_warps, num_stages: warps of a program, and tiles of the depth in flight.
        pieces: 1, 2 or 4, of a tile's columns, in which the epilogue goes.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    pieces: int = 1


@tunable(lambda dtype, target: (8 * dtype.itemsize,))
def select_linear_config(dtype: torch.dtype, target: Target) -> LinearConfig:
    """One tile for a dtype and a target: neither the rows nor the widths change it.

    Compiled and read, not measured; kernels/README.md has what the compiler shows.
    """
    if target.backend == "interpreter":
        return LinearConfig(16, 32, 16, group_m=2, num_warps=1, num_stages=1, pieces=2)
    if dtype == torch.float32:  # multiply-adds outside the tensor cores, where precision is whole
        return LinearConfig(64, 64, 32, group_m=8, num_warps=4, num_stages=2, pieces=2)
    if target.backend == "hip":
        # 64 KB of shared memory; with two stages one tile waits in registers while another is multiplied.
        return LinearConfig(128, 128, 32, group_m=8, num_warps=4, num_stages=2, pieces=2)
    if int(target.arch) in (90, 100):
        # Two groups of four warps, each 64 x 256: the widest product that Hopper's instruction takes.
        return LinearConfig(128, 256, 64, group_m=8, num_warps=8, num_stages=4, pieces=4)
    if int(target.arch) < 80:  # no asynchronous copies
        return LinearConfig(128, 64, 32, group_m=8, num_warps=4, num_stages=2, pieces=2)
    return LinearConfig(128, 128, 32, group_m=8, num_warps=4, num_stages=4, pieces=4)


@dataclass(frozen=True)
class _Rates:
    """Of a family of devices: 16-bit products in TFLOP/s and memory in GB/s, by the vendors' data sheets."""

    tflops: float
    gbytes: float


# The memory of sm_90 is the H200's; an H100's is 3,350 GB/s, which favours fusing.
_RATES: dict[int | str, _Rates] = {
    80: _Rates(312.0, 2039.0),
    86: _Rates(149.7, 696.0),
    89: _Rates(165.2, 1008.0),
    90: _Rates(989.4, 4800.0),
    100: _Rates(2250.0, 8000.0),
    120: _Rates(209.5, 1792.0),
    "gfx942": _Rates(1307.4, 5300.0),
}

# What `select_mlp_path` assumes. None of these has been measured yet: the shares of the peak are what is published of
# large products, about 790 TFLOP/s for cuBLAS on an H200 and three quarters to nine tenths of that for Triton without
# warp specialization; a run on the device replaces them.
CUBLAS_SHARE = 0.78
FUSED_SHARE = {"sm_80": 0.70, "sm_90": 0.62, "sm_100": 0.45, "gfx942": 0.40}
BANDWIDTH_SHARE = 0.90
# How much of what an epilogue reads and writes, beyond what a plain product writes, is not hidden behind the products
# of other programs: those on other multiprocessors leave it more than its share of the memory's speed.
EXPOSED_SHARE = 0.5
# What one more launch takes on the device, in seconds.
LAUNCH_SECONDS = 3e-6


def select_mlp_path(
    rows: int | None, width: int, hidden: int, dtype: torch.dtype, target: Target
) -> tuple[str, str]:
    """("fused" or "separate", the reason): how an MLP's first layer and its backward are computed.

    "fused" is one product with the activation in its epilogue, each way; "separate" a product of the vendor's library
    and a kernel for the activation, or for its derivative and the gradient of the bias. The second layer is the
    library's either way.

    Both are modelled for a training step: the time of two products, quantised for ours to whole waves of tiles, and of
    what moves through memory between product and activation. Fusing saves a pass over (rows, hidden) each way,
    whose share of the time falls with the width; the library's products are faster.

    Args:
        rows: None stands for many.
        width: of x, and taken for that of the output too.
        hidden: of the activation.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return "separate", f"dtype={dtype} has no tensor cores of full precision, where the library is better"
    if target.backend == "interpreter":
        return "separate", "the interpreter has no speed to gain"
    family = "sm_80" if target.arch in (86, 89, 120) else target.name
    if target.arch not in _RATES or family not in FUSED_SHARE:
        return "separate", f"nothing is assumed of the speed of {target.name}"
    if width % 16 or hidden % 16:
        name, value = ("width", width) if width % 16 else ("hidden", hidden)
        return "separate", f"{name}={value} is no multiple of 16: tiles would be loaded in pieces"
    config = select_linear_config(dtype, target)
    if rows is None:
        rows = 64 * target.multiprocessors * config.block_m
    if rows == 0:
        return "separate", "there are no rows"
    fused = _fused_seconds(rows, width, hidden, dtype.itemsize, target, config, FUSED_SHARE[family])
    separate = _separate_seconds(rows, width, hidden, dtype.itemsize, target)
    path, word = ("fused", "below") if fused < separate else ("separate", "not below")
    return path, (
        f"the first layer and its backward are modelled at {fused * 1e6:.0f} us fused, {word} "
        f"{separate * 1e6:.0f} us for the library's products and a pass over memory each (assumed, not measured)"
    )


def widest_fused(dtype: torch.dtype, target: Target) -> int:
    """The largest multiple of 16 that is the width of a fused MLP, in many rows, or 0."""
    for width in range(16384, 0, -16):
        if select_mlp_path(None, width, 4 * width, dtype, target)[0] == "fused":
            return width
    return 0


def _fused_seconds(
    rows: int, width: int, hidden: int, itemsize: int, target: Target, config: LinearConfig, share: float
) -> float:
    """Waves of whole tiles, and the part of the epilogues' traffic that is not hidden: act forward, pre backward."""
    rates = _RATES[target.arch]
    tiles = ceil(rows / config.block_m) * ceil(hidden / config.block_n)
    waves = ceil(tiles / target.multiprocessors)
    tile_flops = 2 * config.block_m * config.block_n * width
    product = waves * tile_flops * target.multiprocessors / (rates.tflops * 1e12 * share)
    more_bytes = 2 * EXPOSED_SHARE * rows * hidden * itemsize
    return 2 * _at_least_its_traffic(
        product, rows, width, hidden, itemsize, rates
    ) + more_bytes / _bytes_a_second(rates)


def _separate_seconds(rows: int, width: int, hidden: int, itemsize: int, target: Target) -> float:
    """Two products, a pass that reads one and writes one tensor forward, and one that reads two and writes one back."""
    rates = _RATES[target.arch]
    product = 2 * rows * width * hidden / (rates.tflops * 1e12 * CUBLAS_SHARE)
    passes = 5 * rows * hidden * itemsize / _bytes_a_second(rates)
    return (
        2 * _at_least_its_traffic(product, rows, width, hidden, itemsize, rates) + passes + 2 * LAUNCH_SECONDS
    )


def _at_least_its_traffic(
    seconds: float, rows: int, width: int, hidden: int, itemsize: int, rates: _Rates
) -> float:
    """A product of few rows takes as long as its weight takes to read."""
    moved = (rows * width + width * hidden + rows * hidden) * itemsize
    return max(seconds, moved / _bytes_a_second(rates))


def _bytes_a_second(rates: _Rates) -> float:
    return rates.gbytes * 1e9 * BANDWIDTH_SHARE
