"""fastattn.rotary_embedding under torch.compile, export, autocast, checkpointing and torch.func; its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.testing import make_tensor
from tests.ops.comparison import ALL_CHECKS, CHECKS_OF_ARGUMENTS
from tests.rotary_checks import DIM, FAST, rotate_half, tables

CALLS: dict[str, tuple[Any, ...]] = {
    "offset": (None, None, None, 3, False, False),
    "positions": (torch.arange(10).reshape(2, 5), None, None, 0, False, True),
    "packed": (None, torch.tensor([1, 2]), torch.tensor([0, 3, 7]), 0, True, False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_opcheck(call: tuple[Any, ...], device: torch.device) -> None:
    call = tuple(t.to(device) if isinstance(t, Tensor) else t for t in call)
    if call[2] is not None:
        tensors = [make_tensor(8, 2, DIM, device=device)]
    else:
        tensors = [make_tensor(2, 5, heads, DIM, device=device).transpose(1, 2) for heads in (3, 1)]
    for operator in ("rotary_embedding", "rotary_embedding_in_place"):
        checks = CHECKS_OF_ARGUMENTS if call[2] is None else ALL_CHECKS
        copies = [x.clone() for x in tensors]
        arguments = (copies, *tables(device=device), *call)
        torch.library.opcheck(getattr(torch.ops.fastattn, operator).default, arguments, test_utils=checks)


# What is in place is a rotation, as without, and a copy where gradients are recorded. The compiler is left to trace
# PyTorch's own operators; what it makes of them is its own.
BACKENDS = {"triton": "aot_eager", None: "eager"}


@pytest.mark.parametrize("implementation", BACKENDS)
def test_trains_compiled_whole_with_dynamic_shapes(implementation: str | None, device: torch.device) -> None:
    """A view is rotated in place, and its base read afterwards.

    No two sizes are alike: the compiler would take them for one. The rows are a symbol; of PyTorch's operators, which
    take little time, the batch and the offset too.
    """
    cos, sin = tables(device=device)
    frames, left = CompileCounterWithBackend(BACKENDS[implementation]), implementation is None

    def step(rotate: Callable[[Tensor, int], Tensor], x: Tensor, offset: int) -> Tensor:
        base = x * 2
        y = rotate(base[:, 0], offset)
        return (y * base[:, 1]).sum() + base.square().sum()

    def ours(x: Tensor, offset: int) -> Tensor:
        return fastattn.rotary_embedding(
            x, cos, sin, offsets=offset, inplace=True, implementation=implementation
        )

    def theirs(x: Tensor, offset: int) -> Tensor:
        return x.copy_(rotate_half(x, *(t[offset : offset + x.size(2)] for t in (cos, sin))))

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, offset: step(ours, x, offset),
        fullgraph=True,
        backend=frames,
        dynamic=True if left else None,
    )
    for batch, seq, offset in ((5, 7, 9), (6, 10, 11) if left else (5, 10, 9)):
        x = make_tensor(batch, 2, 3, seq, DIM, device=device, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 3)
        torch._dynamo.mark_static(x, [1, 2, 4])
        found, right = compiled(x, offset), step(theirs, x, offset)
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, right)))
    assert frames.frame_count == 1


@pytest.mark.parametrize("implementation", BACKENDS)
def test_compiled_in_place_writes_the_input(implementation: str | None, device: torch.device) -> None:
    """Without gradients, through a view of what the graph is given, for several numbers of rows."""
    cos, sin = tables(device=device)
    frames = CompileCounterWithBackend(BACKENDS[implementation])

    def rotate(base: Tensor) -> Tensor:
        x = base[:, 0]
        return fastattn.rotary_embedding(x, cos, sin, inplace=True, implementation=implementation).sum()

    torch._dynamo.reset()
    compiled = torch.compile(rotate, fullgraph=True, backend=frames)
    for rows in (5, 7):
        base = make_tensor(2, 2, 3, rows, DIM, device=device)
        expected = torch.stack((rotate_half(base[:, 0], cos[:rows], sin[:rows]), base[:, 1]), dim=1)
        torch._dynamo.mark_dynamic(base, 3)
        torch.testing.assert_close(compiled(base), expected[:, 0].sum())
        torch.testing.assert_close(base, expected)
    assert frames.frame_count == 1


@pytest.mark.parametrize("packed, implementation", [(False, "triton"), (True, "triton"), (True, "torch")])
def test_export(packed: bool, implementation: str, device: torch.device) -> None:
    class Rotate(torch.nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            return fastattn.rotary_embedding(
                x, cos, sin, cu_seqlens=cu_seqlens, implementation=implementation
            )

    shape = (6, 2, DIM) if packed else (2, 3, 6, DIM)
    cu_seqlens = torch.tensor([0, 2, 5], device=device) if packed else None
    inputs = (make_tensor(*shape, device=device), *tables(device=device), cu_seqlens)
    dims = ({0 if packed else 2: torch.export.Dim("seq", min=2, max=30)}, None, None, None)
    exported = torch.export.export(Rotate(), inputs, dynamic_shapes=dims).module()
    longer = torch.cat((inputs[0], inputs[0]), dim=0 if packed else 2)
    torch.testing.assert_close(
        exported(longer, *inputs[1:]),
        fastattn.rotary_embedding(longer, *inputs[1:3], cu_seqlens=cu_seqlens, implementation="reference"),
    )


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_leaves_the_dtype_alone(implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = make_tensor(1, 2, 3, DIM, dtype=dtype, device=device)
        plain = fastattn.rotary_embedding(x, cos, sin, implementation=implementation)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(fastattn.rotary_embedding(x, cos, sin, implementation=implementation), plain)


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    x = make_tensor(1, 2, 3, DIM, device=device, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        return fastattn.rotary_embedding(x * 1, cos, sin, inplace=True, implementation=implementation)

    plain = torch.autograd.grad(apply(x).pow(3).sum(), x)[0]
    kept = torch.utils.checkpoint.checkpoint(apply, x, use_reentrant=False)
    assert torch.equal(plain, torch.autograd.grad(kept.pow(3).sum(), x)[0])


def test_transforms_are_left_to_pytorch(device: torch.device) -> None:
    cos, sin = tables(device=device)
    x, tangent = make_tensor(2, 2, 3, DIM, device=device), make_tensor(2, 2, 3, DIM, device=device, seed=1)

    def ours(x: Tensor) -> Tensor:
        return fastattn.rotary_embedding(x, cos, sin).pow(3)

    def theirs(x: Tensor) -> Tensor:
        return rotate_half(x, cos[:3], sin[:3]).pow(3)

    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack((x, 2 * x))),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent for f in (ours, theirs)
        )
    torch.testing.assert_close(found, expected)
    with pytest.raises(fastattn.NotSupported, match=r"within torch.func transforms"):
        torch.vmap(lambda x: fastattn.rotary_embedding(x, cos, sin, implementation="triton"))(x[None])
