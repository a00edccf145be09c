"""Rotary position embeddings: registered operators, autograd Functions, public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, refuse_transforms, refuse_triton
from fastattn.kernels._layout import empty_rows
from fastattn.ops._autograd import needs_graph
from fastattn.ops._register import register
from fastattn.ops._rotary_call import RotaryCall, check_rotary, pack_rotary
from fastattn.ops._rotary_torch import (
    rotate_by_operators,
    rotate_by_operators_in_place,
    rotate_differentiably,
)

# A row of features is one tile of a program.
_MAX_HEAD_DIM = 8192

_ARGUMENTS = (
    "Tensor cos, Tensor sin, Tensor? positions, Tensor? starts, Tensor? cu_seqlens, SymInt start, "
    "bool interleaved, bool conjugate"
)
_rotate = register(
    f"rotary_embedding(Tensor[] tensors, {_ARGUMENTS}) -> Tensor[]",
    launcher="kernels.rotary",
    fake=lambda tensors, *call: [empty_rows(x) for x in tensors],
)
_rotate_in_place = register(
    f"rotary_embedding_in_place(Tensor(a!)[] tensors, {_ARGUMENTS}) -> ()",
    launcher="kernels.rotary",
    fake=lambda tensors, *call: None,
)


def _save(ctx: Any, by_kernel: bool, call: RotaryCall) -> None:
    ctx.save_for_backward(*call[:5])
    ctx.by_kernel, ctx.others = by_kernel, call[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Rotates the gradients back: the transpose of a rotation is its inverse. Saved are tables and positions alone."""
    start, interleaved, conjugate = ctx.others
    cos, sin, positions, starts, cu_seqlens = ctx.saved_tensors
    call = RotaryCall(cos, sin, positions, starts, cu_seqlens, start, interleaved, not conjugate)
    wanted = [g for g, need in zip(gradients, needed, strict=True) if need and g is not None]
    turned = iter(_rotated(wanted, call, ctx.by_kernel) if wanted else ())
    return [
        next(turned) if need and g is not None else None for g, need in zip(gradients, needed, strict=True)
    ]


class RotaryFunction(torch.autograd.Function):
    """Rotates one or two tensors. Saves none of them, and its backward is itself, so that any derivative exists."""

    @staticmethod
    def forward(ctx: Any, by_kernel: bool, *arguments: Any) -> tuple[Tensor, ...]:
        call, tensors = RotaryCall(*arguments[:8]), arguments[8:]
        _save(ctx, by_kernel, call)
        results = tuple(_rotate(tensors, *call) if by_kernel else rotate_by_operators(tensors, *call))
        if not all(ctx.needs_input_grad[9:]):
            # Of q and k the one that is not trained, which would make autograd record all that follows it.
            needed = zip(results, ctx.needs_input_grad[9:], strict=True)
            ctx.mark_non_differentiable(*(y for y, need in needed if not need))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * 9 + tuple(_backward(ctx, gradients, ctx.needs_input_grad[9:]))


class RotaryInPlaceFunction(torch.autograd.Function):
    """Rotates a tensor in place; its gradient is a new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by_kernel: bool, *arguments: Any) -> Tensor:
        call = RotaryCall(*arguments)
        _save(ctx, by_kernel, call)
        ctx.mark_dirty(x)
        (_rotate_in_place if by_kernel else rotate_by_operators_in_place)([x], *call)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, (gradient,), ctx.needs_input_grad[:1]), *(None,) * 9


def _rotated(tensors: Sequence[Tensor], call: RotaryCall, by_kernel: bool) -> Sequence[Tensor]:
    if needs_graph(*tensors):
        found: Sequence[Tensor] = RotaryFunction.apply(by_kernel, *call, *tensors)
        return found
    return _rotate(tensors, *call) if by_kernel else rotate_by_operators(tensors, *call)


def _rotated_in_place(tensors: Sequence[Tensor], call: RotaryCall, by_kernel: bool) -> Sequence[Tensor]:
    if needs_graph(*tensors):
        # One at a time: PyTorch rewrites a view's history for functions of one result alone.
        for x in tensors:
            if x.requires_grad:
                RotaryInPlaceFunction.apply(x, by_kernel, *call)
            else:
                _rotated_in_place((x,), call, by_kernel)
    elif by_kernel:
        _rotate_in_place(tensors, *call)
        if not torch.compiler.is_compiling():
            # What autograd saved of these tensors, here or in another tensor's view, is no longer what it was.
            torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
    else:
        with torch.no_grad():
            rotate_by_operators_in_place(tensors, *call)
    return tensors


def _refuse_triton(
    tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool
) -> str | None:
    x = tensors[0]
    reason = refuse_triton(x, x.dtype)
    if reason is None and needs_graph(call.cos, call.sin):
        reason = "cos or sin requires a gradient, which the kernel does not compute"
    if reason is None and x.size(-1) > _MAX_HEAD_DIM:
        reason = f"head_dim={x.size(-1)} is above {_MAX_HEAD_DIM}"
    return reason


def _step_aside(
    tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses a rotation with its neighbours, which a kernel of its own would prevent"
    return None


def _run_triton(
    tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool
) -> Sequence[Tensor]:
    if not torch.compiler.is_compiling():
        return (_rotated_in_place if inplace else _rotated)(tensors, call, True)
    graph = needs_graph(*tensors)
    if inplace and not graph:
        return _rotated_in_place(tensors, call, True)
    if graph:
        # The compiler refuses a Function that is given one tensor twice, and one that writes over its input.
        call = call._replace(sin=call.sin.view_as(call.sin))
        results = _rotated([tensors[0], *(x.view_as(x) for x in tensors[1:])], call, True)
    else:
        results = _rotated(tensors, call, True)
    return _written_over(tensors, results) if inplace else results


def _run_torch(
    tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool
) -> Sequence[Tensor]:
    seen_through = torch.compiler.is_compiling() or needs_graph(call.cos, call.sin) or refuse_transforms()
    if not seen_through:
        return (_rotated_in_place if inplace else _rotated)(tensors, call, False)
    results = [rotate_differentiably(x, *call) for x in tensors]
    return _written_over(tensors, results) if inplace else results


def _run_reference(
    tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool
) -> Sequence[Tensor]:
    offsets = call.start if call.starts is None else call.starts
    results = [
        reference.rotary_embedding(
            x.clone() if inplace else x, call.cos, call.sin, interleaved=call.interleaved, offsets=offsets,
            positions=call.positions, cu_seqlens=call.cu_seqlens,
        )
        for x in tensors
    ]  # fmt: skip
    return _written_over(tensors, results) if inplace else results


def _written_over(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Sequence[Tensor]:
    return [x.copy_(y) for x, y in zip(tensors, results, strict=True)]


_IMPLEMENTATIONS = (
    Implementation(
        "triton",
        run=_run_triton,
        refuse=_refuse_triton,
        step_aside=_step_aside,
        describe=lambda *arguments: (
            "one Triton kernel for both directions, saving the tables and positions alone"
        ),
    ),
    Implementation(
        "torch",
        run=_run_torch,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: (
            "PyTorch's operators on pieces that fit a cache, saving the tables and positions alone"
        ),
    ),
    Implementation(
        "reference",
        run=_run_reference,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: "the product of complex numbers in PyTorch operators",
        only_by_name=True,
    ),
)


def _pack(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return pack_rotary("x", (x,), *arguments)


def _pack_two(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return pack_rotary("qk", (q, k), *arguments)


_ROTARY = Operation("rotary_embedding", check_rotary, _IMPLEMENTATIONS, pack=_pack)
_ROTARY_QK = Operation("rotary_embedding_qk", check_rotary, _IMPLEMENTATIONS, pack=_pack_two)


@_ROTARY.public
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> Tensor:
    r"""Rotary position embedding: each pair of features turned by an angle proportional to its row's position.

    .. math::
        y_1 = x_1 \cos\theta - x_2 \sin\theta \qquad y_2 = x_2 \cos\theta + x_1 \sin\theta

    with the angles of the row's position p, cos[p] and sin[p], of which column i belongs to pair i.

    Args:
        x: (batch, heads, seq, head_dim), or packed (total, heads, head_dim) with `cu_seqlens` or `positions`;
            float16, bfloat16 or float32 for Triton, any floating dtype otherwise.
        cos, sin: (positions, rotary_dim / 2), float32 or in x's dtype, as `fastattn.rotary_tables` makes them. Features
            from rotary_dim on are passed on unchanged.
        interleaved: pair i is features 2 i and 2 i + 1 (GPT-J); False: features i and i + rotary_dim / 2 (GPT-NeoX,
            Llama).
        offsets: the position of each sequence's first row; an int, or int32 or int64 (batch,), with `cu_seqlens`
            (sequences,).
        positions: instead of offsets, int32 or int64 (batch, seq), (seq,) or, of a packed x, (total,).
        cu_seqlens: (sequences + 1,), int32 or int64, rising from 0 to at most total: sequence n has the rows from
            cu_seqlens[n] to cu_seqlens[n + 1]. Rows of no sequence are passed on unchanged. With `positions` it says
            nothing more.
        max_seqlen: the longest sequence of `cu_seqlens`, or more. Nothing needs it; given, it is held against the
            tables where `cu_seqlens` lies on a GPU.
        inplace: write over x, and return it. x's views change with it, as for any operation in place.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of x's shape and dtype, in x's strides where x has neither holes nor overlaps; x itself with `inplace`.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes, devices or options do not fit, or a position lies outside of the tables. Tensors on a
            GPU are read within `fastattn.debug_checks()` only, and none under torch.compile. Unread, a row whose
            position the tables lack gets NaN in its rotated features, and nothing outside of them is read.
        RuntimeError: `inplace` where PyTorch allows no operation in place (a leaf that requires a gradient, a view
            made by unbind or split, a later backward that needs what was overwritten).
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Computed in float32, and under autocast in x's dtype outside of it. The backward is the same rotation by the
        negative angles: saved are tables and positions, never x, and second derivatives exist. Gradients of cos and sin
        go through PyTorch's operators. Any strides with a contiguous last dimension are read in place; what has another
        layout is copied. Under torch.compile a rotation is left to the compiler; in place it is a rotation and a copy
        wherever gradients are recorded.
        In place Triton takes no other memory, and PyTorch's operators 2 MiB for a piece at a time; with gradients of
        cos or sin, and within transforms, these rotate all of x and copy that over it.

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2, equation 34.
    """
    packed = _pack(x, cos, sin, interleaved, offsets, positions, cu_seqlens, max_seqlen, inplace)
    result: Tensor = _ROTARY(implementation, *packed)[0]
    return result


@_ROTARY_QK.public
def rotary_embedding_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastattn.rotary_embedding` of queries and keys of the same positions, in one launch.

    Args:
        q, k: (batch, heads, seq, head_dim) and (batch, kv_heads, seq, head_dim), or packed (total, heads, head_dim)
            and (total, kv_heads, head_dim), of one dtype.
        cos, sin, interleaved, offsets, positions, cu_seqlens, max_seqlen, implementation: as in
            `fastattn.rotary_embedding`.
        inplace: write over q and k, which must have no element in common (views of packed q, k and v have none), and
            return them; a launch each where gradients are recorded. Under torch.compile that is not checked.

    Returns:
        Both, rotated, each as `fastattn.rotary_embedding` returns it.

    Raises:
        TypeError, ValueError, RuntimeError, NotSupported: as `fastattn.rotary_embedding` does.

    Source:
        Su et al. (2021), as there.
    """
    packed = _pack_two(q, k, cos, sin, interleaved, offsets, positions, cu_seqlens, max_seqlen, inplace)
    first, second = _ROTARY_QK(implementation, *packed)
    return first, second


def rotary_tables(
    seq_len: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scale: float = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""cos and sin of the angles that `fastattn.rotary_embedding` takes.

    .. math::
        \theta_{p, i} = \text{scale} \cdot p \cdot \text{base}^{-2 i / \text{rotary\_dim}}

    Args:
        seq_len: positions 0 to seq_len - 1.
        rotary_dim: even; how many features are rotated.
        base: positive; how far the slowest pair's period reaches.
        scale: multiplies positions: 1/4 gives four times as many positions the angles that a model was trained with.
        dtype, device: of the tables.

    Returns:
        (cos, sin), each (seq_len, rotary_dim / 2).

    Raises:
        TypeError: dtype is not floating-point.
        ValueError: a size or number is out of its bounds.

    Notes:
        Angles are computed in float64 and rounded once, as cos and sin: a float32 angle of position 100,000 is off by
        0.004.

    Source:
        Su et al. (2021), section 3.2.2; Chen et al., "Extending Context Window of Large Language Models via Positional
        Interpolation" (2023) for the scale.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} must be a floating-point dtype")
    if seq_len < 0:
        raise ValueError(f"seq_len={seq_len} must be at least 0")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim} must be even and at least 2")
    if not base > 0.0:
        raise ValueError(f"base={base} must be positive")
    device = torch.device(device) if device is not None else torch.get_default_device()
    # Apple's GPUs have no float64.
    work = torch.device("cpu") if device.type == "mps" else device
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=work) / -rotary_dim
    positions = torch.arange(seq_len, dtype=torch.float64, device=work) * scale
    angles = torch.outer(positions, torch.pow(base, exponents))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
