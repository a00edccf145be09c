"""What attention's kernels by warp groups (sm_90, Gluon) share: rings of tiles in shared memory, and descriptors.

A ring is (slots, full, free), the latter two a barrier a slot: "full" completes when the slot's bytes have arrived,
"free" when every group has read them. The n-th use of a slot waits for phase n of "full", and to be filled for the
phase before of "free"; of a phase the barrier keeps whether it is odd.

Imported by a launch of this form alone: Gluon is experimental, and no other kernel needs it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ROWS = gl.constexpr(64)  # of a warp group: 16 of each of its four warps
# Of a thread that computes and of one that loads. Two groups of the one and one of the other have 65,536 and no more.
_REGISTERS = gl.constexpr(240)
_FEW_REGISTERS = gl.constexpr(24)
# Triton 3.9 has a new name for it.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _claim(full, free, step, nbytes):
    """(slot, its barrier) to copy so many bytes to, as soon as it is free, as it is at first."""
    STAGES: gl.constexpr = full.shape[0]
    slot = step % STAGES
    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), nbytes)
    return slot, full.index(slot)


@gluon.jit
def _load(source, batch, head, first, ring, step):
    """Starts the copy of a tile into its slot."""
    slots, full, free = ring
    slot, barrier = _claim(full, free, step, source.block_type.nbytes)
    _copy(source, [batch, head, first, 0], barrier, slots.index(slot))


@gluon.jit
def _await(ring, step):
    """The slot of a step, as soon as all of it is there."""
    full = ring[1]
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return step % STAGES


@gluon.jit
def _tile(slots, slot):
    """A slot as (rows, width)."""
    return slots.index(slot).reshape([slots.shape[3], slots.shape[4]])


@gluon.jit
def _arrived(ring, step):
    """A tile (rows, width) in its slot, as soon as it is there."""
    return _tile(ring[0], _await(ring, step))


@gluon.jit
def _release(ring, step):
    """This group has read a tile."""
    free = ring[2]
    STAGES: gl.constexpr = free.shape[0]
    mbarrier.arrive(free.index(step % STAGES), count=1)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def _slots(source, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(source.dtype, [COUNT] + source.block_type.shape, source.layout)  # noqa: RUF005


@gluon.jit
def _store_rows_of_group(place, tile, batch, head, first, SEQ, WIDTH: gl.constexpr, dtype: gl.constexpr):
    """Writes a group's rows of `Rows`, from row `first` on."""
    LAYOUT: gl.constexpr = tile.type.layout
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.expand_dims(gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    corner = (
        place.ptr + batch * place.stride_b + head * place.stride_h + gl.cast(first, gl.int64) * place.stride_m
    )
    inside = gl.expand_dims(first + rows < SEQ, 1) & (columns < WIDTH)
    gl.store(corner + (gl.expand_dims(rows * place.stride_m, 1) + columns), tile.to(dtype), mask=inside)


def width_of(head_dim: int) -> int:
    """Columns of a tile: a power of two, of at least the 128 bytes that a bulk copy spreads over the banks."""
    return max(64, 1 << (head_dim - 1).bit_length())


def described_rows(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    # A dimension of size 1 may have any stride, which a descriptor would refuse; 16 elements are 16 bytes or more.
    strides = [
        stride if size > 1 else 16 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    layout = _shared_layout(rows, width, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, width], layout)


@cache
def _shared_layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], element)


def described_numbers(tensor: Tensor, count: int) -> TensorDescriptor:
    """Stretches of `count` of a contiguous tensor's float32 numbers, whatever its shape."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(tensor, [tensor.numel()], [1], [count], layout)
