"""Our functions in the place of PyTorch's: assigned over them, on meta and nested tensors, with bad arguments."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn

NAMES = ("scaled_dot_product_attention", "gelu", "layer_norm")


@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_assigned_over_pytorchs_own(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on to PyTorch must not come back to us for ever."""
    x = torch.randn(1, 2, 5, 8)
    expected = [F.gelu(x), F.layer_norm(x, (8,)), F.scaled_dot_product_attention(x, x, x)]
    for name in NAMES:
        monkeypatch.setattr(F, name, getattr(fastattn, name))
    with fastattn.use_implementation(implementation):
        found = [F.gelu(x), F.layer_norm(x, (8,)), F.scaled_dot_product_attention(x, x, x)]
    torch.testing.assert_close(found, expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    assert gradient.requires_grad


def test_meta_tensors_give_shapes() -> None:
    q = torch.empty(2, 4, 9, 16, device="meta")
    k = torch.empty(2, 2, 7, 16, device="meta")
    assert fastattn.attention(q, k, k).shape == q.shape
    assert fastattn.attention(q, k, k, causal="bottom_right", return_lse=True)[1].shape == q.shape[:3]
    assert fastattn.scaled_dot_product_attention(q, k, k, enable_gqa=True).shape == q.shape
    assert fastattn.gelu(q).shape == fastattn.layer_norm(q, 16).shape == q.shape
    assert fastattn.explain(q, k, k).implementation == "torch"


def test_nested_tensors_go_to_pytorch() -> None:
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    for ours, theirs in (
        (fastattn.gelu(rows), F.gelu(rows)),
        (fastattn.layer_norm(rows, 8), F.layer_norm(rows, (8,))),
    ):
        torch.testing.assert_close(ours.values(), theirs.values())
    heads = rows.unflatten(-1, (2, 4)).transpose(1, 2)
    ours = fastattn.scaled_dot_product_attention(heads, heads, heads)
    torch.testing.assert_close(ours.values(), F.scaled_dot_product_attention(heads, heads, heads).values())
    assert "layout=torch.jagged" in fastattn.explain(fastattn.gelu, rows).refusals["triton"]


@pytest.mark.parametrize(
    "keywords",
    [
        dict(is_causal="no"),
        dict(is_causal="bottom_right"),
        dict(is_causal=None),
        dict(dropout_p=-0.5),
        dict(dropout_p=math.nan),
        dict(dropout_p="x"),
    ],
    ids=str,
)
def test_arguments_that_pytorch_refuses_are_refused(keywords: dict[str, Any]) -> None:
    """With PyTorch's own error; the kernels would take some of these for something else."""
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        F.scaled_dot_product_attention(q, q, q, **keywords)
    with pytest.raises(theirs.type) as ours:
        fastattn.scaled_dot_product_attention(q, q, q, **keywords)
    messages = (re.sub(r" \(position \d\)", "", str(error.value)) for error in (ours, theirs))
    assert len(set(messages)) == 1


def test_scale_is_a_keyword() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError):
        fastattn.scaled_dot_product_attention(q, q, q, None, 0.0, False, 0.5)


def test_what_pytorch_would_hold_whole_goes_in_blocks() -> None:
    """Dropout, or a mask that wants a gradient: PyTorch's function has no path of linear memory for them."""
    q = torch.randn(1, 1, 512, 16)
    calls = {
        "dropped": dict(dropout_p=0.1),
        "learned": dict(attn_mask=torch.zeros(512, 512, requires_grad=True)),
        "plain": {},
    }
    with fastattn.use_implementation("torch"):
        said = {
            name: fastattn.explain(fastattn.scaled_dot_product_attention, q, q, q, **keywords).description
            for name, keywords in calls.items()
        }
        found = fastattn.scaled_dot_product_attention(q, q, q, calls["learned"]["attn_mask"])
    assert said["dropped"] == said["learned"]
    assert said["learned"].startswith("blocks of PyTorch operators in linear memory")
    assert said["plain"] == "torch.nn.functional.scaled_dot_product_attention"
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q))


def test_blocks_serve_any_rank_and_the_compiler() -> None:
    q, v = torch.randn(2, 512, 16), torch.randn(2, 512, 8)
    with fastattn.use_implementation("torch"):
        explained = fastattn.explain(fastattn.scaled_dot_product_attention, q, q, q, dropout_p=0.1)
    assert explained.description.startswith("blocks of PyTorch operators")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        lambda q, v: fastattn.scaled_dot_product_attention(q, q, v), fullgraph=True, backend=backend
    )
    with fastattn.use_implementation("torch"):
        found = compiled(q[None], v[None])
    assert "attention_blockwise_forward" in graphs[0]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q[None], q[None], v[None]))


@pytest.mark.parametrize("batches", [(1, 1), (2, 1)])
def test_a_mask_of_rank_5_is_not_multiplied(batches: tuple[int, int], device: torch.device) -> None:
    """AlphaFold's pair bias is shared by all rows; its gradient has its own shape."""
    q = torch.randn(2, 3, 2, 7, 16, device=device)
    bias = torch.randn(*batches, 2, 7, 7, device=device, requires_grad=True)
    expected = F.scaled_dot_product_attention(q, q, q, bias)
    (wanted,) = torch.autograd.grad(expected.square().sum(), bias)
    with fastattn.use_implementation("triton"):
        out = fastattn.scaled_dot_product_attention(q, q, q, bias)
    (found,) = torch.autograd.grad(out.square().sum(), bias)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
