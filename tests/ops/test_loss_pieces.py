"""PyTorch's operators on a CPU: a chunk's losses and gradients are computed some rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops import _loss_chunks
from fastattn.ops._loss_chunks import Chunks, chunk_rows, chunk_rows_of, piece_rows
from fastattn.testing import make_tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "reduction": "sum"},
    "none-everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "reduction": "none"},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_change_nothing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit those of the whole chunk: every row is its own, and the last piece is smaller."""
    x, weight = make_tensor(23, 8, dtype=dtype), make_tensor(31, 8, dtype=dtype, seed=1)
    target = torch.arange(23) % 31
    target[::5] = -100
    found = []
    for piece in (1 << 17, 4 * 31 // torch.get_num_threads(), 1):
        monkeypatch.setattr(_loss_chunks, "_PIECE", piece)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        loss = fastattn.linear_cross_entropy(*leaves, target, implementation="torch", **OPTIONS[name])
        without = fastattn.linear_cross_entropy(x, weight, target, implementation="torch", **OPTIONS[name])
        dloss = torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape).to(loss.dtype)
        found.append((loss.detach(), without, *torch.autograd.grad(loss, leaves, dloss)))
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_pieces_are_what_the_threads_caches_hold() -> None:
    threads = torch.get_num_threads()
    assert piece_rows(32_768) == 4 * threads
    assert piece_rows(1 << 30) == 1
    assert piece_rows(0) == piece_rows(1) == (1 << 17) * threads


def test_a_piece_is_in_the_budget() -> None:
    """Bytes of a chunk of r rows: 2 a logit, and 4 more of the rows that are worked on, here at most 40."""
    for budget in (1, 6_000, 40 * 6_000, 40 * 6_000 + 1, 300_000, 1_000_000):
        rows = chunk_rows(4096, 8, 1000, 2, 2, 512, budget, 40, 4)
        assert rows == 1 or rows * 2_000 + min(rows, 40) * 4_000 <= budget
    for rows in (20, 40):
        assert chunk_rows(4096, 8, 1000, 2, 2, 512, rows * 6_000, 40, 4) == rows
    assert chunk_rows(4096, 8, 1000, 2, 2, 512, 128 * 2_000 + 40 * 4_000, 40, 4) == 128
    assert chunk_rows(4096, 8, 1000, 2, 2, 512, None, 40, 4) == 512


def test_memory_of_16_bits_is_that_of_the_logits_and_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a chunk's logits once were there in float32 too, three times as much."""
    monkeypatch.setattr(_loss_chunks, "piece_rows", lambda classes: 4)
    input, weight = torch.empty(4096, 8, dtype=torch.bfloat16), torch.empty(1000, 8, dtype=torch.bfloat16)
    how = Chunks(256 * 2_000 + 4 * 4_000, torch.bfloat16, False)
    assert chunk_rows_of(input, weight, None, how) == 256
    assert chunk_rows_of(input, weight, 3.0, how) == 128  # float32 once more in a piece, so a tile less
    made = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    for _, logits, work, _, _ in _loss_chunks._chunks(input, weight, None, None, how):
        assert work is not None and work.shape == (4, 1000) and work.dtype == torch.float32
        assert logits.dtype == torch.bfloat16
    assert len(made) == 1
