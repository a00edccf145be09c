"""fastattn.rotary_embedding: values and gradients of every implementation, positions, packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing import assert_accurate, make_tensor
from tests.rotary_checks import ALL, DIM, FAST, both, rotate_half, tables

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAIRINGS = {"halves": False, "interleaved": True}


# One row at the last position; two tiles of them, of which the second is not full.
SIZES = [("fp32", 1, 39), ("fp32", 6, 5), ("bf16", 6, 5), ("fp16", 6, 0)]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype, seq, offset", SIZES)
def test_matches_model_code(
    dtype: str, seq: int, offset: int, pairing: str, implementation: str, device: torch.device
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

    x = make_tensor(2, 2, seq, DIM, dtype=DTYPES[dtype], device=device)
    for name, found, peer, truth in zip(
        ("y", "dx"), both(ours, x), both(theirs, x), both(theirs, x.double()), strict=True
    ):
        assert_accurate(found, peer, truth, name=name)


PLACES: dict[str, dict[str, Any]] = {
    "start-of-each-batch": {"offsets": torch.tensor([3, 20])},
    "int32-starts": {"offsets": torch.tensor([3, 20], dtype=torch.int32)},
    "positions-of-each-batch": {"positions": torch.arange(10).reshape(2, 5) * 5 % 37},
    "positions-of-all": {"positions": torch.tensor([5, 1, 1, 0, 39], dtype=torch.int32)},
    "positions-strided": {"positions": torch.arange(20).reshape(5, 4)[:, ::2].t()},
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_positions(places: dict[str, Tensor], implementation: str, device: torch.device) -> None:
    places = {name: t.to(device) for name, t in places.items()}
    cos, sin = tables(device=device)
    positions = places.get("positions")
    if positions is None:
        positions = torch.arange(5, device=device) + places["offsets"].unsqueeze(1)
    angles = [t[positions].unsqueeze(1) if positions.dim() == 2 else t[positions] for t in (cos, sin)]
    x = make_tensor(2, 2, 5, DIM, device=device)
    ours = both(lambda x: fastattn.rotary_embedding(x, cos, sin, **places, implementation=implementation), x)
    for found, expected in zip(ours, both(lambda x: rotate_half(x, *angles), x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    "starts, dtype", [(4, torch.int32), ("tensor", torch.int32), ("tensor", torch.int64)], ids=str
)
def test_packed_sequences(
    starts: int | str, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    """Lengths 4, 0, 1 and 3, and two rows of no sequence, which hold an infinity and stay as they are."""
    cu_seqlens = torch.tensor([0, 4, 4, 5, 8], dtype=dtype, device=device)
    offsets = torch.tensor([2, 9, 30, 1], dtype=dtype, device=device) if starts == "tensor" else starts
    cos, sin = tables(device=device)
    x = make_tensor(10, 2, DIM, device=device)
    x[8:] = torch.inf
    y, dx = both(
        lambda x: fastattn.rotary_embedding(
            x, cos, sin, offsets=offsets, cu_seqlens=cu_seqlens, implementation=implementation
        ),
        x,
    )
    dy = make_tensor(10, 2, DIM, device=device, seed=9)
    assert torch.equal(y[8:], x[8:]) and torch.equal(dx[8:], dy[8:])
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


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("needed", ["q", "k", "qk"])
def test_q_and_k_in_one_call(needed: str, implementation: str, device: torch.device) -> None:
    cos, sin = tables(device=device)
    q, k = make_tensor(2, 3, 5, DIM, device=device), make_tensor(2, 1, 5, DIM, device=device, seed=1)
    q.requires_grad_("q" in needed), k.requires_grad_("k" in needed)
    leaves = [t for t in (q, k) if t.requires_grad]
    found = fastattn.rotary_embedding_qk(q, k, cos, sin, offsets=2, implementation=implementation)
    expected = [rotate_half(t, cos[2:7], sin[2:7]) for t in (q, k)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Autograd would otherwise record all that follows a frozen one, for gradients that nobody gets.
    assert [y.requires_grad for y in found] == [x.requires_grad for x in (q, k)]
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


@pytest.mark.parametrize("interleaved", [False, True])
def test_pieces_of_pytorchs_path(interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces within a sequence, of one sequence, and of several, in place and not, in every dtype."""
    cos, sin = tables()
    starts = torch.tensor([3, 0, 9])
    for piece in (1, 2 * 7 * DIM, 5 * 7 * DIM, 1 << 17):
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


def test_explain_and_forcing(device: torch.device) -> None:
    x, (cos, sin) = make_tensor(1, 2, 3, DIM, device=device), tables(device=device)
    found = fastattn.explain(fastattn.rotary_embedding, x, cos, sin, interleaved=True)
    assert (found.operation, found.implementation) == ("rotary_embedding", "triton")
    found = fastattn.explain(fastattn.rotary_embedding_qk, x, x[:, :1].clone(), cos, sin, inplace=True)
    assert found.refusals == {
        "torch": "'triton' comes first",
        "reference": "runs only when asked for by name",
    }
    with fastattn.use_implementation("torch"):
        assert fastattn.explain(fastattn.rotary_embedding, x, cos, sin).implementation == "torch"
    double = fastattn.explain(fastattn.rotary_embedding, x.double(), cos, sin)
    assert double.implementation == "torch" and "dtype=torch.float64" in double.refusals["triton"]
