"""fastattn.rotary_embedding and rotary_embedding_qk in place."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.ops._rotary_call import _share_elements
from fastattn.testing import make_tensor
from tests.rotary_checks import ALL, DIM, FAST, rotate_half, tables

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
    leaf = make_tensor(2, 3, 1, DIM, DIM, device=device)  # (batch, three, heads, seq, head_dim)
    dy = make_tensor(2, 1, DIM, DIM, device=device, seed=1)

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
        start = make_tensor(1, 5, 3, 2, DIM, device=device, requires_grad=True)
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
    with pytest.raises(ValueError, match=r"inplace=True with strides \(48, 0, 8, 1\) would write"):
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


# q and k of one memory (batch, seq, 3, heads, head_dim), or packed (total, 3, heads, head_dim).
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "packed-qkv": lambda m: (m[:, :, 0].transpose(1, 2), m[:, :, 1].transpose(1, 2)),
    "packed-rows": lambda m: (m.flatten(0, 1)[:, 0], m.flatten(0, 1)[:, 1]),
    "k-before-q": lambda m: (m[:, :, 2].transpose(1, 2), m[:, :, 0].transpose(1, 2)),
    "fewer-heads": lambda m: (m[:, :, 0, :2].transpose(1, 2), m[:, :, 0, 2:].transpose(1, 2)),
    "interleaved-heads": lambda m: (m[:, :, 0, ::2].transpose(1, 2), m[:, :, 0, 1::2].transpose(1, 2)),
    "interleaved-rows": lambda m: (m[:, ::2, 0].transpose(1, 2), m[:, 1::2, 0].transpose(1, 2)),
    "end-to-end": lambda m: (m[:1, :, 0].transpose(1, 2), m[1:, :, 0].transpose(1, 2)),
    "no-rows": lambda m: (m[:, :0, 0].transpose(1, 2), m[:, :0, 0].transpose(1, 2)),
}
OVERLAPPING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "two-views-of-one": lambda m: (m[:, :, 0].transpose(1, 2), m[:, :, 0].transpose(1, 2)),
    "detached": lambda m: (m[:, :, 0].transpose(1, 2), m.detach()[:, :, 0].transpose(1, 2)),
    "a-head-in-common": lambda m: (m[:, :, 0, :2].transpose(1, 2), m[:, :, 0, 1:].transpose(1, 2)),
    "a-row-in-common": lambda m: (m[:, :3, 0].transpose(1, 2), m[:, 1:, 0].transpose(1, 2)),
    "half-a-row-further": lambda m: (
        m[:, :, 0].transpose(1, 2),
        m.flatten().as_strided(
            m[:, :, 0].transpose(1, 2).shape, m[:, :, 0].transpose(1, 2).stride(), DIM // 2
        ),
    ),
    "of-other-strides": lambda m: (
        m.flatten()[: 2 * 4 * DIM].view(1, 2, 4, DIM),
        m.flatten()[3 * DIM :][: 2 * 4 * DIM].view(1, 4, 2, DIM).transpose(1, 2),
    ),
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_in_place_refuses_q_and_k_that_overlap(
    views: Callable[[Tensor], tuple[Tensor, Tensor]], implementation: str, device: torch.device
) -> None:
    """What both have was turned twice, by one tensor's programs while the other's read it: refused unwritten."""
    memory = make_tensor(2, 4, 3, 3, DIM, device=device)
    before = memory.clone()
    with pytest.raises(ValueError, match=r"q and k overlap in memory .* strides .* clone one of them before"):
        fastattn.rotary_embedding_qk(
            *views(memory), *tables(device=device), inplace=True, implementation=implementation
        )
    assert torch.equal(memory, before)


@pytest.mark.parametrize("views", APART.values(), ids=APART.keys())
def test_in_place_takes_q_and_k_within_each_others_range(
    views: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device
) -> None:
    memory = make_tensor(2, 4, 3, 4, DIM, device=device)
    q, k = views(memory)
    cos, sin = tables(device=device)
    options = {} if q.dim() == 4 else {"cu_seqlens": torch.tensor([0, 5, 8], device=device)}
    expected = fastattn.rotary_embedding_qk(q, k, cos, sin, implementation="torch", **options)
    fastattn.rotary_embedding_qk(q, k, cos, sin, inplace=True, implementation="torch", **options)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_sharing_an_element_is_found_as_by_looking_at_every_one() -> None:
    """Tensors of any shapes and strides, expanded and empty ones too, at any distance of each other."""
    generator = torch.Generator().manual_seed(0)

    def draw(values: list[int], count: int) -> tuple[int, ...]:
        return tuple(values[i] for i in torch.randint(len(values), (count,), generator=generator).tolist())

    def elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> set[int]:
        return {sum(map(operator.mul, index, strides)) for index in itertools.product(*map(range, shape))}

    seen = set()
    for _ in range(2000):
        dims = draw([1, 2, 3], 2)
        (shape, other), (strides, others) = (
            [draw(values, count) for count in dims] for values in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6, 12])
        )
        (distance,) = draw(list(range(-20, 21)), 1)
        first, second = elements(shape, strides), {distance + e for e in elements(other, others)}
        expected = bool(first & second)
        assert _share_elements(shape, strides, other, others, distance) == expected
        seen.add(expected)
    assert seen == {True, False}


def test_views_are_traced_with_symbolic_sizes() -> None:
    """`make_fx` gives sizes that have no hash, which the cached answer about overlaps was asked with."""
    cos, sin = fastattn.rotary_tables(6, 10)

    def rotated(packed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        packed = packed * 1
        q, k = fastattn.rotary_embedding_qk(packed[:, :1], packed[:, 1:3], cos, sin, inplace=True)
        return q.sum() + k.sum()

    packed = make_tensor(2, 3, 6, 10)
    graph = make_fx(rotated, tracing_mode="symbolic")(packed, cos, sin)
    torch.testing.assert_close(graph(packed, cos, sin), rotated(packed, cos, sin))
