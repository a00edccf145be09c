"""The norms are torch.nn's, alone and behind a residual sum."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.nn.pairs import IMPLEMENTATIONS, assert_same, make_pair


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "keywords", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.5}], ids=str
)
def test_layer_norm_matches(
    implementation: str | None, keywords: dict[str, Any], device: torch.device
) -> None:
    keywords = {**keywords, "implementation": implementation}
    module, peer = make_pair(fastattn.nn.LayerNorm, torch.nn.LayerNorm, device, (5, 7), **keywords)
    assert repr(module) == repr(peer)
    assert_same(module, peer, lambda m, x: m(x), make_tensor(3, 5, 7, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keywords", [{}, {"elementwise_affine": False}, {"eps": 0.5}], ids=str)
def test_rms_norm_matches(implementation: str | None, keywords: dict[str, Any], device: torch.device) -> None:
    keywords = {**keywords, "implementation": implementation}
    module, peer = make_pair(fastattn.nn.RMSNorm, torch.nn.RMSNorm, device, (5, 7), **keywords)
    assert repr(module) == repr(peer)
    assert_same(module, peer, lambda m, x: m(x), make_tensor(3, 5, 7, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_add_norms_match_a_sum_and_a_norm(
    name: str, implementation: str | None, device: torch.device
) -> None:
    """And they drop in training alone."""
    ours, theirs = getattr(fastattn.nn, f"Add{name}"), getattr(torch.nn, name)
    module, peer = make_pair(ours, theirs, device, 7, implementation=implementation)

    def call(m: torch.nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        y, total = m(x, residual) if m is module else (m(residual + x), residual + x)
        return torch.cat([y, total])

    x, residual = make_tensor(3, 7, device=device), make_tensor(3, 7, device=device, seed=1)
    assert_same(module, peer, call, x, residual)
    _, total = ours(7, dropout=1.0, implementation=implementation).to(device)(x, residual)
    assert torch.equal(total, residual)
    module = ours(7, dropout=1.0, residual_dtype=torch.float64, implementation="torch").to(device).eval()
    assert torch.equal(module(x, residual)[1], residual.double() + x)
