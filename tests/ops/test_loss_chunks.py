"""The chunks of rows of fastattn.linear_cross_entropy: their sizes, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks.memory import peak_memory
from fastattn import dispatch
from fastattn.ops._loss_chunks import Chunks, chunk_rows, chunk_rows_of
from tests.ops.test_linear_cross_entropy import (
    CLASSES,
    FAST,
    formula,
    make_inputs,
    peer,
    results,
)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("budget", [1, 4 * CLASSES * 4, 1 << 30, None])
def test_chunks_change_nothing(budget: int | None, implementation: str, device: torch.device) -> None:
    leaves, target = make_inputs("fp32", device)
    found = results(
        fastattn.linear_cross_entropy, leaves, target, memory_budget=budget, implementation=implementation
    )
    torch.testing.assert_close(found, results(formula, leaves, target))


def test_chunk_rows() -> None:
    """Without a budget a quarter of input and weight, but `least` rows; with one at least a row; even chunks."""

    def rows(count: int, budget: int | None = None, least: int = 128) -> int:
        return chunk_rows(count, 256, 32_768, 4, 4, least, budget)

    assert rows(512) == 128  # a quarter of the weight is 64 rows
    assert rows(8192, least=1024) == 1024
    assert rows(100) == 100
    assert rows(0) == 1
    assert rows(512, budget=1) == 1
    assert rows(512, budget=7 * 32_768 * 4) == 7
    assert rows(512, budget=300 * 32_768 * 4) == 256
    assert rows(1100, budget=1024 * 32_768 * 4) == 640  # not 1,024 and 76
    assert rows(512, budget=1 << 40) == 512
    # Wide models: a quarter of input and weight is 3,072 rows of logits in the same dtype.
    assert chunk_rows(65_536, 8192, 131_072, 2, 2, 1024, None) == 3072
    for count in (1, 129, 1000, 4097):
        for budget in (None, 1, 200 * 32_768 * 4):
            size = rows(count, budget)
            assert 1 <= size <= max(count, 1)


def test_operators_memory_is_counted() -> None:
    """Logits in float32 are worked on in place; 16 bits take a copy in float32, a soft cap one more."""
    input, weight = torch.empty(4096, 8, device="meta"), torch.empty(1000, 8, device="meta")
    for dtype, softcap, triton, size in (
        (torch.float32, None, False, 4),
        (torch.float32, 3.0, False, 8),
        (torch.bfloat16, None, False, 6),
        (torch.bfloat16, 3.0, False, 10),
        (torch.bfloat16, 3.0, True, 2),
        (torch.float64, None, False, 8),
    ):
        how = Chunks(256 * 1000 * size, dtype, triton)
        assert chunk_rows_of(input, weight, softcap, how) == 256


def test_explain_shows_the_chunks(device: torch.device) -> None:
    (input, weight, _), target = make_inputs("fp32", device)
    call = fastattn.linear_cross_entropy, input, weight, target
    explanation = fastattn.explain(*call, memory_budget=4 * CLASSES * 4)
    assert explanation.implementation == "triton"
    assert (
        explanation.description
        == "chunks of 4 rows, their products by PyTorch, losses and dlogits by Triton kernels"
    )
    double = fastattn.explain(call[0], input.double(), weight.double(), target)
    assert double.implementation == "torch" and "float64 is not one of" in double.refusals["triton"]


def test_memory_on_a_cpu_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, one gradient of the weight and one of the input, where whole logits take three times themselves."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    rows, width, classes = 512, 16, 4096
    input = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def step(loss: Callable[..., Tensor]) -> None:
        torch.autograd.grad(loss(input, weight, target), (input, weight))

    logits = rows * classes * 4
    gradients = (rows + classes) * width * 4
    found = peak_memory(lambda: step(fastattn.linear_cross_entropy), "cpu")
    assert found <= 1.05 * (logits / 4 + gradients)
    assert found <= peak_memory(lambda: step(peer), "cpu") / 4
