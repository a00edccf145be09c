"""fastattn.rotary_embedding, through every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")
ALL = (*FAST, "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAIRINGS = {"halves": False, "interleaved": True}
DIM = 16


def tables(length: int = 40, rotary_dim: int = DIM, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    return fastattn.rotary_tables(length, rotary_dim, device=device)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x cos + rotate_half(x) sin as model code has it, with angles (seq, pairs) or (batch, 1, seq, pairs)."""
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        half = x.size(-1) // 2
        other = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.to(x.dtype) + other * sin.to(x.dtype)


def both(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, make_tensor(*x.shape, device=x.device, seed=9).to(x.dtype))[0]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("seq, offset", [(1, 39), (13, 0), (13, 5)])
def test_matches_model_code(
    seq: int, offset: int, dtype: torch.dtype, pairing: str, implementation: str, device: torch.device
) -> None:
    """Forward and gradient against rotate_half in float64, at most twice its error in x's dtype."""
    interleaved = PAIRINGS[pairing]
    cos, sin = tables(device=device)
    rows = slice(offset, offset + seq)

    def ours(x: Tensor) -> Tensor:
        return fastattn.rotary_embedding(
            x, cos, sin, interleaved=interleaved, offsets=offset, implementation=implementation
        )

    def theirs(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotate_half(x, cos[rows].to(wide), sin[rows].to(wide), interleaved)

    x = make_tensor(2, 3, seq, DIM, dtype=dtype, device=device)
    for name, found, peer, truth in zip(
        ("y", "dx"), both(ours, x), both(theirs, x), both(theirs, x.double()), strict=True
    ):
        assert_accurate(found, peer, truth, name=name)


PLACES: dict[str, dict[str, Any]] = {
    "start-of-each-batch": {"offsets": torch.tensor([3, 20])},
    "int32-starts": {"offsets": torch.tensor([3, 20], dtype=torch.int32)},
    "positions-of-each-batch": {"positions": torch.arange(14).reshape(2, 7) * 5 % 37},
    "positions-of-all": {"positions": torch.tensor([5, 1, 1, 0, 39, 7, 2], dtype=torch.int32)},
    "positions-strided": {"positions": torch.arange(28).reshape(7, 4)[:, ::2].t()},
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_positions(places: dict[str, Tensor], implementation: str, device: torch.device) -> None:
    places = {name: t.to(device) for name, t in places.items()}
    cos, sin = tables(device=device)
    positions = places.get("positions")
    if positions is None:
        positions = torch.arange(7, device=device) + places["offsets"].unsqueeze(1)
    angles = [t[positions].unsqueeze(1) if positions.dim() == 2 else t[positions] for t in (cos, sin)]
    x = make_tensor(2, 3, 7, DIM, device=device)
    ours = both(lambda x: fastattn.rotary_embedding(x, cos, sin, **places, implementation=implementation), x)
    for found, expected in zip(ours, both(lambda x: rotate_half(x, *angles), x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("starts", [0, 4, "tensor"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_sequences(
    dtype: torch.dtype, starts: int | str, implementation: str, device: torch.device
) -> None:
    """Lengths 5, 0, 1 and 9, and two rows of no sequence, which hold an infinity and stay as they are."""
    cu_seqlens = torch.tensor([0, 5, 5, 6, 15], dtype=dtype, device=device)
    offsets = torch.tensor([2, 9, 30, 1], dtype=dtype, device=device) if starts == "tensor" else starts
    cos, sin = tables(device=device)
    x = make_tensor(17, 3, DIM, device=device)
    x[15:] = torch.inf
    y, dx = both(
        lambda x: fastattn.rotary_embedding(
            x, cos, sin, offsets=offsets, cu_seqlens=cu_seqlens, implementation=implementation
        ),
        x,
    )
    dy = make_tensor(17, 3, DIM, device=device, seed=9)
    assert torch.equal(y[15:], x[15:]) and torch.equal(dx[15:], dy[15:])
    for n in range(4):
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        first = int(offsets[n]) if isinstance(offsets, Tensor) else offsets
        angles = [t[first : first + rows.stop - rows.start] for t in (cos, sin)]
        expected = both(lambda x, angles=angles: rotate_half(x, *angles), x[rows].transpose(0, 1))[0]
        torch.testing.assert_close(y[rows].transpose(0, 1), expected)


@pytest.mark.parametrize("implementation", ALL)
def test_packed_positions(implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    x, positions = make_tensor(6, 3, DIM, device=device), torch.tensor([4, 0, 39, 7, 7, 1], device=device)
    expected = rotate_half(x.transpose(0, 1), cos[positions], sin[positions]).transpose(0, 1)
    for others in ({}, {"cu_seqlens": torch.tensor([0, 2, 6], device=device)}):
        found = fastattn.rotary_embedding(
            x, cos, sin, positions=positions, implementation=implementation, **others
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_features_beyond_rotary_dim_are_passed_on(
    pairing: str, implementation: str, device: torch.device
) -> None:
    interleaved = PAIRINGS[pairing]
    cos, sin = tables(length=5, rotary_dim=6, device=device)
    x = make_tensor(2, 2, 5, 11, device=device)
    options = {"interleaved": interleaved, "implementation": implementation}
    y = fastattn.rotary_embedding(x, cos, sin, **options)
    torch.testing.assert_close(y[..., :6], rotate_half(x[..., :6], cos, sin, interleaved))
    assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 0, 3, 16), (2, 2, 0, 16)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str, device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    for length in (3, 0) if 0 in shape[2:3] else (3,):
        y = fastattn.rotary_embedding(x, *tables(length, device=device), implementation=implementation)
        assert y.shape == shape and torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", ["offsets", "positions", "packed", "starts"])
def test_positions_that_were_not_checked_give_nan(
    kind: str, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where values are not read: rows beyond the tables are NaN, and the others right."""
    for module in ("_rotary_call", "_rotary_torch", "_attention_call"):
        monkeypatch.setattr(f"fastattn.ops.{module}.checking", lambda tensor: False)
    buffer = torch.full((9, DIM // 2), 7.0, device=device)
    cos, sin = tables(5, device=device)
    buffer[2:7] = cos
    cos = buffer[2:7]
    x = make_tensor(2, 2, 4, DIM, device=device)
    huge, places = 1 << 40, torch.tensor([[0, -1, 4, 5], [1 << 40, 1, -(1 << 40), 3]], device=device)
    options: dict[str, Any] = {"positions": places}
    if kind == "offsets":
        options, places = (
            {"offsets": torch.tensor([3, -2], device=device)},
            torch.tensor([[3, 4, 5, 6], [-2, -1, 0, 1]], device=device),
        )
    elif kind == "packed":
        x = x.transpose(1, 2).flatten(0, 1)
        options = {"cu_seqlens": torch.tensor([0, 1, 8], device=device)}
        places = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6], device=device)
    elif kind == "starts":
        x = x.transpose(1, 2).flatten(0, 1)
        options = {
            "cu_seqlens": torch.tensor([0, 4, 8], device=device),
            "offsets": torch.tensor([huge, 1], device=device),
        }
        places = torch.tensor([huge, huge, huge, huge, 1, 2, 3, 4], device=device)
    y = fastattn.rotary_embedding(x, cos, sin, implementation=implementation, **options)
    outside = (places < 0) | (places > 4)
    y = y.transpose(-2, -3) if y.dim() == 4 else y  # (..., heads, head_dim) behind the places
    assert y[outside].isnan().all() and y[~outside].isfinite().all()


@pytest.mark.parametrize("bounds", [[0, 100, -7, 5], [-9, 3, 3, 2], [4, 4, 4, 4]], ids=str)
def test_wrong_bounds_read_nothing_beyond(
    bounds: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("_rotary_call", "_attention_call"):
        monkeypatch.setattr(f"fastattn.ops.{module}.checking", lambda tensor: False)
    x, cu_seqlens = make_tensor(9, 2, DIM, device=device), torch.tensor(bounds, device=device)
    y = fastattn.rotary_embedding(x, *tables(device=device), cu_seqlens=cu_seqlens, implementation="triton")
    assert y.shape == x.shape


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda qkv: qkv[:, 0].clone(),
    "indexed": lambda qkv: qkv[:, 1],
    "sliced": lambda qkv: qkv[:, 1:2].squeeze(1),
    "last-not-contiguous": lambda qkv: qkv[:, 1].transpose(2, 3),
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("view", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_in_place_with_gradients(
    view: Callable[[Tensor], Tensor], implementation: str, device: torch.device
) -> None:
    """The gradient of what came before, through views of packed q, k and v too; the incoming one is not written."""
    cos, sin = tables(device=device)
    leaf = make_tensor(2, 3, 4, DIM, DIM, device=device)  # (batch, three, heads, seq, head_dim)
    dy = make_tensor(2, 4, DIM, DIM, device=device, seed=1)

    def run(inplace: bool) -> tuple[Tensor, ...]:
        start = leaf.clone().requires_grad_()
        qkv = start * 2
        x = view(qkv)
        if inplace:
            y = fastattn.rotary_embedding(x, cos, sin, inplace=True, implementation=implementation)
            assert y is x
        else:
            y = rotate_half(x, cos[:DIM], sin[:DIM])
        given = dy.clone()
        (gradient,) = torch.autograd.grad((y * 1, qkv * 1), start, (given, torch.zeros_like(leaf)))
        assert torch.equal(given, dy)
        return y.detach(), gradient

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_in_place_of_all_of_qkv(implementation: str, device: torch.device) -> None:
    """q and k one after the other, and what the base has of them; then attention's other use of the base."""
    cos, sin = tables(device=device)
    gradients, values = [], []
    for inplace in (True, False):
        start = make_tensor(2, 5, 3, 4, DIM, device=device, requires_grad=True)
        qkv = start * 1
        q, k, v = (qkv[:, :, n].transpose(1, 2) for n in range(3))
        if inplace:
            fastattn.rotary_embedding_qk(q, k, cos, sin, inplace=True, implementation=implementation)
        else:
            q, k = (rotate_half(x, cos[:5], sin[:5]) for x in (q, k))
        values.append((q * k).sum() + (k * v).square().sum())
        gradients.append(torch.autograd.grad(values[-1], start)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("implementation", FAST)
def test_in_place_tells_autograd(implementation: str, device: torch.device) -> None:
    """What another function saved is no longer there, and its backward says so rather than being wrong."""
    cos, sin = tables(device=device)
    weight = torch.ones((), device=device, requires_grad=True)
    x = make_tensor(1, 2, 3, DIM, device=device)
    product = weight * x
    fastattn.rotary_embedding(x, cos, sin, inplace=True, implementation=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("implementation", FAST)
def test_in_place_where_pytorch_allows_none(implementation: str, device: torch.device) -> None:
    """Each raises before anything is written."""
    call = {"inplace": True, "implementation": implementation}
    cos, sin = tables(device=device)
    leaf = make_tensor(1, 2, 3, DIM, device=device, requires_grad=True)
    kept = leaf.detach().clone()
    for view in (leaf, leaf[:, :1], leaf.view(1, 2, 3, DIM)):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            fastattn.rotary_embedding(view, cos, sin, **call)
    assert torch.equal(leaf, kept)
    both_heads = leaf * 1
    with pytest.raises(RuntimeError, match="made beside others by one function"):
        fastattn.rotary_embedding(both_heads.chunk(2, dim=1)[0], cos, sin, **call)
    assert torch.equal(both_heads, kept)
    with pytest.raises(ValueError, match=r"inplace=True with strides \(96, 0, 16, 1\) would write"):
        fastattn.rotary_embedding(kept[:, :1].expand(1, 2, 3, DIM), cos, sin, **call)
    with pytest.raises(ValueError, match="q and k are one tensor"):
        fastattn.rotary_embedding_qk(kept, kept, cos, sin, **call)
    with torch.no_grad():
        assert fastattn.rotary_embedding(leaf, cos, sin, **call) is leaf
    torch.testing.assert_close(leaf.detach(), rotate_half(kept, cos[:3], sin[:3]))


@pytest.mark.parametrize("implementation", FAST)
def test_in_place_in_inference_mode(implementation: str, device: torch.device) -> None:
    with torch.inference_mode():
        cos, sin = tables(device=device)
        x = make_tensor(1, 2, 3, DIM, device=device) * 1
        expected = rotate_half(x, cos[:3], sin[:3])
        fastattn.rotary_embedding(x, cos, sin, inplace=True, implementation=implementation)
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("needed", ["q", "k", "qk"])
def test_q_and_k_in_one_call(needed: str, implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    q, k = make_tensor(2, 6, 9, DIM, device=device), make_tensor(2, 2, 9, DIM, device=device, seed=1)
    q.requires_grad_("q" in needed), k.requires_grad_("k" in needed)
    leaves = [t for t in (q, k) if t.requires_grad]
    found = fastattn.rotary_embedding_qk(q, k, cos, sin, offsets=2, implementation=implementation)
    expected = [rotate_half(t, cos[2:11], sin[2:11]) for t in (q, k)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    pairs = zip(
        *(torch.autograd.grad(sum(t.square().sum() for t in r), leaves) for r in (found, expected)),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
    if needed == "qk":  # one of them unused
        y = fastattn.rotary_embedding_qk(q, k, cos, sin, implementation=implementation)[1]
        unused, used = torch.autograd.grad(y.sum(), (q, k), allow_unused=True)
        assert (unused is None or not unused.any()) and used.shape == k.shape


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in-place"])
def test_double_backward(inplace: bool, implementation: str, device: torch.device) -> None:
    x = make_tensor(1, 2, 3, DIM, device=device, requires_grad=True)
    dy = make_tensor(1, 2, 3, DIM, device=device, seed=1, requires_grad=True)
    cos, sin = tables(device=device)

    def derivatives(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(function(x.square()).pow(2), x, dy, create_graph=True)
        return dx, *torch.autograd.grad(dx.square().sum(), (x, dy))

    def ours(x: Tensor) -> Tensor:
        return fastattn.rotary_embedding(x, cos, sin, inplace=inplace, implementation=implementation)

    for found, expected in zip(
        derivatives(ours), derivatives(lambda x: rotate_half(x, cos[:3], sin[:3])), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_saves_tables_alone_and_writes_nothing(implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    x = make_tensor(1, 2, 3, DIM, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastattn.rotary_embedding(x, cos, sin, implementation=implementation)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}
    dy, kept = make_tensor(1, 2, 3, DIM, device=device, seed=1), [x.detach().clone()]
    kept_dy = dy.clone()
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(dy, kept_dy) and torch.equal(x, kept[0])


def test_gradients_of_the_tables_go_through_pytorch(device: torch.device) -> None:
    cos, sin = (t.requires_grad_() for t in tables(5, device=device))
    x = make_tensor(2, 3, 5, DIM, device=device, requires_grad=True)
    found = torch.autograd.grad(fastattn.rotary_embedding(x, cos, sin).pow(3).sum(), (x, cos, sin))
    expected = torch.autograd.grad(rotate_half(x, cos, sin).pow(3).sum(), (x, cos, sin))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    explanation = fastattn.explain(fastattn.rotary_embedding, x, cos, sin)
    assert explanation.implementation == "torch"
    assert "cos or sin requires a gradient" in explanation.refusals["triton"]
    with pytest.raises(fastattn.NotSupported, match="cos or sin requires a gradient"):
        fastattn.rotary_embedding(x, cos, sin, implementation="triton")


CALLS: dict[str, tuple[Any, ...]] = {
    "offset": (None, None, None, 3, False, False),
    "starts": (None, torch.tensor([1, 4]), None, 0, True, True),
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
        copies = [x.clone() for x in tensors]
        torch.library.opcheck(
            getattr(torch.ops.fastattn, operator).default, (copies, *tables(device=device), *call)
        )


COMPILED = {
    "inference-in-place": ("triton", True, False),
    "training": ("triton", False, True),
    "training-in-place": ("triton", True, True),
    "left-to-the-compiler": (None, True, True),
}


@pytest.mark.parametrize("implementation, inplace, graph", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_whole_with_dynamic_shapes(
    implementation: str | None, inplace: bool, graph: bool, device: torch.device
) -> None:
    """A view is rotated, and its base read afterwards. No two sizes are alike: the compiler would take them for one."""
    cos, sin = tables(device=device)
    frames = CompileCounterWithBackend("aot_eager")

    def step(rotate: Callable[[Tensor, int], Tensor], x: Tensor, offset: int) -> Tensor:
        base = x * 2
        y = rotate(base[:, 0], offset)
        return (y * base[:, 1]).sum() + base.square().cumsum(-1).sum()

    def ours(x: Tensor, offset: int) -> Tensor:
        return fastattn.rotary_embedding(
            x, cos, sin, offsets=offset, inplace=inplace, implementation=implementation
        )

    def theirs(x: Tensor, offset: int) -> Tensor:
        y = rotate_half(x, *(t[offset : offset + x.size(2)] for t in (cos, sin)))
        return x.copy_(y) if inplace else y

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, offset: step(ours, x, offset), fullgraph=True, backend=frames, dynamic=True
    )
    for batch, seq, offset in ((4, 5, 7), (6, 9, 8)):
        x = make_tensor(batch, 2, 3, seq, DIM, device=device, requires_grad=graph)
        found, right = compiled(x, offset), step(theirs, x, offset)
        torch.testing.assert_close(found, right)
        if graph:
            gradients = [torch.autograd.grad(y, x)[0] for y in (found, right)]
            torch.testing.assert_close(*gradients)
    assert frames.frame_count == 1


@pytest.mark.parametrize("implementation", ["triton", None])
def test_compiled_in_place_writes_the_input(implementation: str | None, device: torch.device) -> None:
    cos, sin = tables(device=device)
    x = make_tensor(1, 2, 3, DIM, device=device)
    expected = rotate_half(x, cos[:3], sin[:3])
    torch._dynamo.reset()
    torch.compile(
        lambda x: fastattn.rotary_embedding(x, cos, sin, inplace=True, implementation=implementation),
        fullgraph=True,
        backend="aot_eager",
    )(x)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
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


def test_explain_and_forcing(device: torch.device) -> None:
    x, (cos, sin) = make_tensor(1, 2, 3, DIM, device=device), tables(device=device)
    found = fastattn.explain(fastattn.rotary_embedding, x, cos, sin, interleaved=True)
    assert (found.operation, found.implementation) == ("rotary_embedding", "triton")
    found = fastattn.explain(fastattn.rotary_embedding_qk, x, x[:, :1], cos, sin, inplace=True)
    assert found.refusals == {
        "torch": "'triton' comes first",
        "reference": "runs only when asked for by name",
    }
    with fastattn.use_implementation("torch"):
        assert fastattn.explain(fastattn.rotary_embedding, x, cos, sin).implementation == "torch"
    double = fastattn.explain(fastattn.rotary_embedding, x.double(), cos, sin)
    assert double.implementation == "torch" and "dtype=torch.float64" in double.refusals["triton"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_pieces_of_pytorchs_path(interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces within a sequence, of one sequence, and of several, in place and not, in every dtype."""
    cos, sin = tables()
    starts = torch.tensor([3, 0, 9])
    for piece in (1, 100, 2 * 7 * DIM, 5 * 7 * DIM, 1 << 17):
        monkeypatch.setattr("fastattn.ops._rotary_torch._PIECE", piece)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = make_tensor(3, 7, 2, DIM, dtype=dtype).transpose(1, 2)
            for offsets in (0, starts):
                options = {"interleaved": interleaved, "offsets": offsets}
                expected = fastattn.rotary_embedding(x, cos, sin, implementation="reference", **options)
                y = fastattn.rotary_embedding(x, cos, sin, implementation="torch", **options)
                torch.testing.assert_close(y, expected)
                assert y.stride() == x.stride()
                z = x.clone()
                fastattn.rotary_embedding(z, cos, sin, implementation="torch", inplace=True, **options)
                assert torch.equal(z, y)


X, (COS, SIN) = torch.randn(2, 3, 5, 8), tables(6, 8)
PACKED, BOUNDS = torch.randn(7, 3, 8), torch.tensor([0, 3, 7])
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-not-a-tensor": ({"x": 1.0}, TypeError, "x must be a torch.Tensor, not float"),
    "x-of-integers": ({"x": X.long()}, TypeError, "x has dtype=torch.int64; a floating-point dtype"),
    "x-of-2-dimensions": (
        {"x": X[0, 0]},
        ValueError,
        r"x has shape \(5, 8\); \(batch, heads, seq, head_dim\)",
    ),
    "packed-without-bounds": ({"x": PACKED}, ValueError, "with cu_seqlens or positions, "),
    "bounds-of-4-dimensions": ({"cu_seqlens": BOUNDS}, ValueError, r"x has shape \(2, 3, 5, 8\)"),
    "cos-not-a-tensor": ({"cos": 1.0}, TypeError, "cos must be a torch.Tensor, not float"),
    "shapes-of-tables": (
        {"sin": SIN[:, :2]},
        ValueError,
        r"shapes \(6, 4\) and \(6, 2\); \(positions, rotary",
    ),
    "3-d-tables": ({"cos": COS[None], "sin": SIN[None]}, ValueError, r"shapes \(1, 6, 4\) and"),
    "rotary-dim": ({"x": X[..., :7]}, ValueError, "rotary_dim=8, .* must lie within 2 and head_dim=7"),
    "no-pair": ({"cos": COS[:, :0], "sin": SIN[:, :0]}, ValueError, "rotary_dim=0, .* must lie within 2"),
    "dtype-of-tables": (
        {"cos": COS.double(), "sin": SIN.double()},
        TypeError,
        r"cos and sin have torch.float64 and torch.float64; both must have float32 or x's torch.float32",
    ),
    "two-dtypes": ({"sin": SIN.bfloat16()}, TypeError, "cos and sin have torch.float32 and torch.bfloat16"),
    "device": ({"cos": COS.to("meta"), "sin": SIN.to("meta")}, ValueError, "cos is on meta, but x is on cpu"),
    "offset-beyond": ({"offsets": 2}, ValueError, "position 6 lies outside of cos and sin, which have 6"),
    "offset-negative": ({"offsets": -1}, ValueError, "position -1 lies outside of cos and sin"),
    "offset-float": ({"offsets": 1.0}, TypeError, "offsets must be an int or a torch.Tensor, not float"),
    "offset-bool": ({"offsets": True}, TypeError, "offsets must be an int or a torch.Tensor, not bool"),
    "starts-beyond": ({"offsets": torch.tensor([0, 2])}, ValueError, "position 6 lies outside"),
    "starts-negative": ({"offsets": torch.tensor([0, -2])}, ValueError, "position -2 lies outside"),
    "starts-shape": (
        {"offsets": torch.tensor([0, 1, 1])},
        ValueError,
        r"offsets has shape \(3,\), not \(2,\)",
    ),
    "starts-dtype": (
        {"offsets": torch.ones(2)},
        TypeError,
        "offsets has dtype=torch.float32 and must be int32",
    ),
    "positions-beyond": ({"positions": torch.arange(2, 7)}, ValueError, "position 6 lies outside"),
    "positions-negative": ({"positions": torch.arange(-1, 4)}, ValueError, "position -1 lies outside"),
    "positions-shape": (
        {"positions": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"positions has shape \(2,\), not \(5,\) or \(2, 5\)",
    ),
    "positions-list": ({"positions": [1]}, TypeError, "positions must be a torch.Tensor, not list"),
    "positions-and-offsets": (
        {"positions": torch.zeros(5, dtype=torch.int64), "offsets": 1},
        ValueError,
        "offsets and positions say the same",
    ),
    "packed-positions-shape": (
        {"x": PACKED, "positions": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        r"positions has shape \(5,\), not \(7,\)",
    ),
    "bounds-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS + BOUNDS},
        ValueError,
        "cu_seqlens ends at 14, beyond",
    ),
    "bounds-fall": (
        {"x": PACKED, "cu_seqlens": BOUNDS.flip(0)},
        ValueError,
        "must begin with 0 and never fall",
    ),
    "longest": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "max_seqlen": 3},
        ValueError,
        "has a sequence of 4 rows, above max_seqlen=3",
    ),
    "sequence-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "offsets": 3},
        ValueError,
        "position 6 lies outside",
    ),
    "sequence-start-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "offsets": torch.tensor([4, 2])},
        ValueError,
        "position 6 lies outside",
    ),
    "implementation": (
        {"implementation": "cuda"},
        ValueError,
        "fastattn.rotary_embedding has 'triton', 'torch'",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "cos": COS, "sin": SIN} | change
    x = arguments.pop("x")
    with pytest.raises(error, match=message):
        fastattn.rotary_embedding(x, **arguments)


def test_longest_is_held_against_the_tables_where_bounds_are_not_read() -> None:
    packed, bounds = PACKED.to("meta"), BOUNDS.to("meta")
    with pytest.raises(ValueError, match="position 6 lies outside"):
        fastattn.rotary_embedding(
            packed, COS.to("meta"), SIN.to("meta"), cu_seqlens=bounds, max_seqlen=7, implementation="torch"
        )


def test_q_and_k_must_fit() -> None:
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 5, 8\) and k \(2, 3, 4, 8\)"):
        fastattn.rotary_embedding_qk(X, X[:, :, :4], COS, SIN)
    with pytest.raises(TypeError, match="q and k must have one dtype"):
        fastattn.rotary_embedding_qk(X, X.bfloat16(), COS, SIN)


def test_last_sequence_may_end_at_the_last_position() -> None:
    """The longest sequence does not start furthest on: each is checked with its own start."""
    starts = torch.tensor([3, 2])
    y = fastattn.rotary_embedding(PACKED, COS, SIN, cu_seqlens=BOUNDS, offsets=starts)
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tables_are_rounded_once(dtype: torch.dtype) -> None:
    """In float32 the angle 131071 is off by more than cos's own rounding, by a factor of ten thousand."""
    length = 131072
    cos, sin = fastattn.rotary_tables(length, 6, base=500.0, scale=0.5, dtype=dtype)
    assert cos.shape == sin.shape == (length, 3) and cos.dtype == sin.dtype == dtype
    position = torch.arange(length, dtype=torch.float64) * 0.5
    for pair in range(3):
        angle = position / 500.0 ** (2 * pair / 6)
        for table, expected in ((cos, angle.cos()), (sin, angle.sin())):
            torch.testing.assert_close(table[:, pair], expected.to(dtype))
    assert cos[0].eq(1).all() and sin[0].eq(0).all()


def test_tables_name_what_is_wrong() -> None:
    for keywords, error, message in (
        ({"rotary_dim": 5}, ValueError, "rotary_dim=5 must be even"),
        ({"seq_len": -1}, ValueError, "seq_len=-1 must be at least 0"),
        ({"base": 0.0}, ValueError, "base=0.0 must be positive"),
        ({"dtype": torch.int32}, TypeError, "dtype=torch.int32 must be a floating-point dtype"),
    ):
        with pytest.raises(error, match=message):
            fastattn.rotary_tables(**{"seq_len": 4, "rotary_dim": 4} | keywords)


def test_module(device: torch.device) -> None:
    module = fastattn.nn.RotaryEmbedding(DIM, 20, base=100.0, interleaved=True, device=device)
    assert not module.state_dict() and not list(module.parameters())
    x = make_tensor(2, 3, 7, DIM, device=device)
    cos, sin = fastattn.rotary_tables(20, DIM, base=100.0, device=device)
    expected = rotate_half(x, cos[4:11], sin[4:11], interleaved=True)
    torch.testing.assert_close(module(x, offsets=4), expected)
    positions = torch.arange(4, 11, device=device)
    torch.testing.assert_close(module(x, positions=positions), expected)
    packed = x[0].transpose(0, 1).contiguous()
    bounds = torch.tensor([0, 7], device=device)
    found = module(packed, offsets=4, cu_seqlens=bounds, max_seqlen=7, inplace=True)
    assert found is packed
    torch.testing.assert_close(found, expected[0].transpose(0, 1))
    with pytest.raises(ValueError, match="position 20 lies outside of cos and sin, which have 20 positions"):
        module(x, offsets=14)
    assert repr(module) == "RotaryEmbedding(16, max_seq_len=20, base=100.0, interleaved=True)"


def test_module_keeps_exact_tables() -> None:
    """model.bfloat16() would round them, and to_empty() of a model on "meta" leave whatever memory holds."""
    expected = fastattn.nn.RotaryEmbedding(DIM, 300).cos
    for module in (
        torch.nn.Sequential(fastattn.nn.RotaryEmbedding(DIM, 300)).bfloat16(),
        torch.nn.Sequential(fastattn.nn.RotaryEmbedding(DIM, 300, device="meta")).to_empty(device="cpu"),
    ):
        assert torch.equal(module[0].cos, expected)
