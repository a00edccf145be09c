"""How many programs fit on a multiprocessor, and how fast a launch could be: the least time of each resource."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from benchmarks.costs import attention_pairs
from benchmarks.inspection.launches import Launch, tensors_of
from benchmarks.inspection.machine_code import MachineCode
from fastattn.kernels._arguments import Rows
from fastattn.kernels._target import KNOWN_TARGETS


@dataclass(frozen=True)
class Device:
    """What a device can do, as its vendor publishes it.

    Attributes:
        name: the product that the rates are of.
        tensor_tflops: dense 16-bit matrix products accumulated in float32.
        float32_tflops: multiply-adds outside the tensor cores.
        clock_ghz: at which these are reached.
        memory_gb_s: device memory.
        special_per_clock: special functions a clock and multiprocessor.
        registers, shared, warps, programs: of a multiprocessor; registers of 32 bits for all threads.
        register_unit: in which registers of a warp are given out.
        reserved_shared: bytes that the system takes of each program's shared memory.
        latency_us: of a load from device memory while the memory is busy; of the order that microbenchmarks publish.
    """

    name: str
    tensor_tflops: float
    float32_tflops: float
    clock_ghz: float
    memory_gb_s: float
    registers: int = 65_536
    shared: int = 233_472
    warps: int = 64
    programs: int = 32
    register_unit: int = 256
    reserved_shared: int = 1024
    special_per_clock: int = 16
    threads_of_a_warp: int = 32
    latency_us: float = 0.8


# From the vendors' data sheets and, for the limits of a multiprocessor, NVIDIA's table of compute capabilities
# and AMD's CDNA3 description (four SIMDs of 512 registers a lane and eight waves each).
DEVICES = {
    "sm_75": Device("T4", 65, 8.1, 1.59, 320, shared=65_536, warps=32, programs=16, reserved_shared=0),
    "sm_80": Device("A100 80 GB", 312, 19.5, 1.41, 2039, shared=167_936, latency_us=0.6),
    "sm_86": Device("A40", 149.7, 37.4, 1.74, 696, shared=102_400, warps=48, programs=16),
    "sm_89": Device("RTX 4090", 165.2, 82.6, 2.52, 1008, shared=102_400, warps=48, programs=24),
    "sm_90": Device("H200", 989.4, 66.9, 1.83, 4800),
    "sm_100": Device("B200", 2250, 75, 1.85, 8000),
    "sm_120": Device("RTX 5090", 209.5, 104.8, 2.41, 1792, shared=102_400, warps=48),
    "gfx942": Device(
        "MI300X", 1307.4, 163.4, 2.1, 5300, registers=131_072, shared=65_536, warps=32, programs=32,
        register_unit=512, reserved_shared=0, threads_of_a_warp=64,
    ),
}  # fmt: skip


def programs_per_multiprocessor(code: MachineCode, arch: str) -> int:
    """How many programs a multiprocessor holds at a time, by registers, shared memory and warps."""
    device = DEVICES[arch]
    unit = device.register_unit
    of_a_warp = -(-code.registers * device.threads_of_a_warp // unit) * unit
    # Registers belong to one of four schedulers, and a warp stays on its scheduler.
    warps_by_registers = 4 * (device.registers // 4 // of_a_warp) if of_a_warp else device.warps
    limits = [device.programs, min(device.warps, warps_by_registers) // code.warps]
    if code.shared:
        limits.append(device.shared // (code.shared + device.reserved_shared))
    return min(limits)


def occupancy(code: MachineCode, arch: str) -> float:
    """The share of a multiprocessor's warps that are there at a time."""
    return programs_per_multiprocessor(code, arch) * code.warps / DEVICES[arch].warps


def needed_in_flight(arch: str) -> float:
    """Bytes that a multiprocessor must have on their way for all of the memory's bandwidth (Little, 1961)."""
    device = DEVICES[arch]
    return device.memory_gb_s * 1e9 * device.latency_us * 1e-6 / KNOWN_TARGETS[arch].multiprocessors


# Instructions of a thread that a multiprocessor starts in a clock: of a warp, on each of four schedulers.
_ISSUED_PER_CLOCK = 128
# The sizes of what a kernel goes over, by their names; the constants that shape its tile begin with BLOCK.
_SIZES = (("SIZE",), ("ROWS", "WIDTH"), ("ROWS", "CLASSES"), ("COUNT", "WIDTH"))


def tile_of(launch: Launch) -> tuple[int, float]:
    """Of a kernel that goes over elements: how many there are, and those of a tile that lie within the sizes.

    (0, 0.0) for kernels of matrix products, whose elements enter many times.
    """
    arguments = launch.arguments
    if "DEPTH" in arguments:
        return 0, 0.0
    for names in _SIZES:
        if all(name in arguments for name in names):
            sizes = [arguments[name] for name in names]
            blocks = [v for n, v in arguments.items() if n.startswith("BLOCK")]
            inside = (size / -(-size // block) for size, block in zip(sizes, blocks, strict=True))
            return prod(sizes), prod(inside)
    if "GROUP" in arguments and "PAIRS" in arguments:  # rotary: a head's features at some positions
        features = [t for t in tensors_of(arguments) if t.dim() > 2]
        return sum(t.numel() for t in features) // 2, arguments["BLOCK_M"] * arguments["HEAD_DIM"]
    return 0, 0.0


def issue_ms(elements: int, an_element: float, arch: str) -> float:
    """The least time in which all multiprocessors start so many instructions an element."""
    a_second = KNOWN_TARGETS[arch].multiprocessors * _ISSUED_PER_CLOCK * DEVICES[arch].clock_ghz * 1e9
    return elements * an_element / a_second * 1e3


@dataclass(frozen=True)
class Work:
    """What one launch must at least do."""

    flops: int
    special: int
    bytes: int
    float32: bool
    e4m3: bool = False


@dataclass(frozen=True)
class Bound:
    """The least time of a launch on a device, and where it comes from."""

    ms: float
    by: str
    formula: str


def work_of(launch: Launch) -> Work:
    """Products and special functions by the kernel's formula, bytes from the tensors it is given.

    Every tensor is read or written once. A kernel without a formula of its own has only the bytes.
    """
    tensors = tensors_of(launch.arguments)
    # Of a view its own elements, of what is broadcast those that there are.
    nbytes = sum(min(t.untyped_storage().nbytes(), t.numel() * t.itemsize) for t in tensors)
    float32 = bool(tensors) and tensors[0].dtype == torch.float32
    flops = special = 0
    arguments = launch.arguments
    if launch.name in _PRODUCTS_OF_A_SCORE:
        pairs = prod(_pairs(arguments))
        flops = 2 * _products(launch) * pairs * _query_shape(arguments)[3]
        special = pairs
    elif launch.name == "linear_activation":
        special = arguments["ROWS"] * arguments["COLUMNS"]
        flops = 2 * special * arguments["DEPTH"]
    elif launch.name.startswith(("gelu", "bias_activation", "gated")):
        special = tensors[0].numel()
    return Work(flops, special, nbytes, float32, bool(tensors) and tensors[0].dtype == torch.float8_e4m3fn)


_PRODUCTS_OF_A_SCORE = {
    "attention_forward": 2,
    "attention_forward_warp_groups": 2,
    "attention_dq": 3,
    "attention_dq_warp_groups": 3,
    "attention_dk_dv": 4,
    "attention_dk_dv_warp_groups": 4,
}


def _products(launch: Launch) -> int:
    """Matrix products in which each score takes part: q k^T, dO v^T and one for each gradient."""
    if not launch.name.startswith("attention_dk_dv"):
        return _PRODUCTS_OF_A_SCORE[launch.name]
    needs_dk, needs_dv = launch.arguments["NEEDS_DK"], launch.arguments["NEEDS_DV"]
    return 1 + 2 * needs_dk + needs_dv


def _query_shape(arguments: dict[str, Any]) -> Sequence[int]:
    """Of q, which is `Rows` or a descriptor."""
    q = arguments["q"]
    shape: Sequence[int] = q.ptr.shape if isinstance(q, Rows) else q.shape
    return shape


def _pairs(arguments: dict[str, Any]) -> tuple[int, int]:
    """(heads of all sequences, visible scores of one)."""
    batch, heads = _query_shape(arguments)[:2]
    seq_q, seq_k = arguments["SEQ_Q"], arguments["SEQ_K"]
    causal: bool | str = False
    if arguments["RIGHT"] == 0:
        causal = "bottom_right" if arguments["BOTTOM_RIGHT"] else "top_left"
    left = arguments.get("LEFT", -1) if causal else -1
    left = left if left >= 0 else None
    return batch * heads, attention_pairs(seq_q, seq_k, causal, left)


def bound_of(work: Work, arch: str) -> Bound:
    """The largest of three times: matrix products, special functions, device memory."""
    device, target = DEVICES[arch], KNOWN_TARGETS[arch]
    tflops = device.float32_tflops if work.float32 else device.tensor_tflops
    if work.e4m3:
        tflops = 2 * device.tensor_tflops  # of every device that has them
    special_rate = target.multiprocessors * device.special_per_clock * device.clock_ghz * 1e9
    times = {
        "tensor": work.flops / (tflops * 1e12) * 1e3,
        "special": work.special / special_rate * 1e3,
        "memory": work.bytes / (device.memory_gb_s * 1e9) * 1e3,
    }
    if work.float32:
        times = {"multiply-add" if name == "tensor" else name: ms for name, ms in times.items()}
    by = max(times, key=lambda name: times[name])
    parts = [
        f"{name} {amount:.3g} {unit} / {rate:.4g} {unit}/s = {times[name]:.3g} ms"
        for name, amount, rate, unit in zip(
            times,
            (work.flops / 1e12, work.special / 1e12, work.bytes / 1e9),
            (tflops, special_rate / 1e12, device.memory_gb_s),
            ("TFLOP", "T", "GB"),
            strict=True,
        )
        if amount
    ]
    return Bound(times[by], by, f"{device.name}: " + "; ".join(parts))
