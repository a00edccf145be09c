"""value * activation(gate) over rows, forward and backward: GEGLU, SwiGLU and ReGLU (Shazeer, 2020).

Value and gate may be the halves of one tensor; the backward then writes the gradient of the whole in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._activation import _activate, _through_activation
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous, halves
from fastattn.kernels._norm_tiles import _load_tile, _multiple_of, _store_tile
from fastattn.kernels._pointwise_config import TileConfig, tile_plan
from fastattn.kernels.bias_activation import _tile_of


@triton.jit(do_not_specialize=["ROWS"])
def _gated_forward_kernel(
    value_ptr,
    gate_ptr,
    y_ptr,
    stride_vm,
    stride_gm,
    ROWS,
    WIDTH,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes a tile of y; grid (row tiles * column tiles,).

    y is contiguous, value and gate have unit column strides.
    """
    WIDTH = _multiple_of(WIDTH, ALIGNMENT)
    stride_vm, stride_gm = _multiple_of(stride_vm, ALIGNMENT), _multiple_of(stride_gm, ALIGNMENT)
    rows, columns, inside = _tile_of(tl.program_id(0), ROWS, WIDTH, BLOCK_M, BLOCK_N)
    value = _load_tile(value_ptr + rows[:, None] * stride_vm, columns, inside)  # (BLOCK_M, BLOCK_N)
    gate = _load_tile(gate_ptr + rows[:, None] * stride_gm, columns, inside)
    y = value * _activate(gate, ACTIVATION, y_ptr.dtype.element_ty)
    _store_tile(y_ptr + rows[:, None] * WIDTH, y, columns, inside)


@triton.jit(do_not_specialize=["ROWS"])
def _gated_backward_kernel(
    dy_ptr,
    value_ptr,
    gate_ptr,
    dvalue_ptr,
    dgate_ptr,
    stride_dym,
    stride_vm,
    stride_gm,
    stride_dvm,
    stride_dgm,
    ROWS,
    WIDTH,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes a tile of dvalue and dgate, where these are given; grid (row tiles * column tiles,).

    All have unit column strides.
    """
    WIDTH, stride_dym = _multiple_of(WIDTH, ALIGNMENT), _multiple_of(stride_dym, ALIGNMENT)
    stride_vm, stride_gm = _multiple_of(stride_vm, ALIGNMENT), _multiple_of(stride_gm, ALIGNMENT)
    stride_dvm, stride_dgm = _multiple_of(stride_dvm, ALIGNMENT), _multiple_of(stride_dgm, ALIGNMENT)
    rows, columns, inside = _tile_of(tl.program_id(0), ROWS, WIDTH, BLOCK_M, BLOCK_N)
    dy = _load_tile(dy_ptr + rows[:, None] * stride_dym, columns, inside)  # (BLOCK_M, BLOCK_N)
    gate = _load_tile(gate_ptr + rows[:, None] * stride_gm, columns, inside)
    if dvalue_ptr is not None:
        dvalue = dy * _activate(gate, ACTIVATION, gate_ptr.dtype.element_ty)
        _store_tile(dvalue_ptr + rows[:, None] * stride_dvm, dvalue, columns, inside)
    if dgate_ptr is not None:
        value = _load_tile(value_ptr + rows[:, None] * stride_vm, columns, inside)
        dgate = _through_activation(dy * value, gate, ACTIVATION, gate_ptr.dtype.element_ty)
        _store_tile(dgate_ptr + rows[:, None] * stride_dgm, dgate, columns, inside)


def gated_forward(
    value: Tensor, gate: Tensor, activation: str, *, config: TileConfig | None = None
) -> Tensor:
    """y = value * activation(gate), in value's dtype, contiguous.

    Args:
        value, gate: (..., width), any strides; rows at unequal distances are copied.
        activation: a name of `fastattn.kernels._activation`.
        config: replaces the selected launch config.
    """
    y = empty_contiguous(value)
    if y.numel() == 0:
        return y
    strides = (value.stride(), gate.stride())
    plan = tile_plan(value.shape, strides, value.dtype, 2, config, _target.target_of(value.device))
    with _target.launching_on(value):
        launch(
            _gated_forward_kernel,
            plan.grid,
            plan.constants,
            value_ptr=plan.read(0, value),
            gate_ptr=plan.read(1, gate),
            y_ptr=y,
            stride_vm=plan.distances[0],
            stride_gm=plan.distances[1],
            ACTIVATION=activation,
        )
    return y


def gated_backward(
    dy: Tensor, value: Tensor, gate: Tensor, activation: str, need_dvalue: bool, need_dgate: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_forward`'s y, contiguous; an empty tensor for one that is not asked for."""
    dvalue = empty_contiguous(value) if need_dvalue else value.new_empty(0)
    dgate = empty_contiguous(gate) if need_dgate else gate.new_empty(0)
    _launch_backward(
        dy, value, gate, dvalue if need_dvalue else None, dgate if need_dgate else None, activation
    )
    return dvalue, dgate


def gated_packed_backward(dy: Tensor, x: Tensor, activation: str, gate_first: bool) -> Tensor:
    """The gradient of x (..., 2 * width), whose halves are value and gate, contiguous, in one pass."""
    dx = empty_contiguous(x)
    value, gate = halves(x, gate_first)
    _launch_backward(dy, value, gate, *halves(dx, gate_first), activation)
    return dx


def _launch_backward(
    dy: Tensor, value: Tensor, gate: Tensor, dvalue: Tensor | None, dgate: Tensor | None, activation: str
) -> None:
    """Fills dvalue and dgate, where given: views of contiguous tensors."""
    if dy.numel() == 0 or (dvalue is None and dgate is None):
        return
    strides = [None if t is None else t.stride() for t in (dy, value, gate, dvalue, dgate)]
    plan = tile_plan(dy.shape, tuple(strides), value.dtype, 3, None, _target.target_of(value.device))
    with _target.launching_on(value):
        launch(
            _gated_backward_kernel,
            plan.grid,
            plan.constants,
            dy_ptr=plan.read(0, dy),
            value_ptr=plan.read(1, value),
            gate_ptr=plan.read(2, gate),
            dvalue_ptr=dvalue,
            dgate_ptr=dgate,
            stride_dym=plan.distances[0],
            stride_vm=plan.distances[1],
            stride_gm=plan.distances[2],
            stride_dvm=plan.distances[3],
            stride_dgm=plan.distances[4],
            ACTIVATION=activation,
        )
