"""What fastattn.cross_entropy saves, and what it writes over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.testing import make_tensor
from tests.ops.test_cross_entropy import make_target, results


def test_in_place_the_logits_become_their_gradient(device: torch.device) -> None:
    leaf, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    logits = 2 * leaf
    fastattn.cross_entropy(logits, target, inplace=True).backward()
    (dlogits,) = torch.autograd.grad(F.cross_entropy(x := (2 * leaf).detach().requires_grad_(), target), x)
    torch.testing.assert_close(logits.detach(), dlogits)
    torch.testing.assert_close(leaf.grad, 2 * dlogits)


def test_in_place_refuses_what_would_be_wrong(device: torch.device) -> None:
    leaf, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    with pytest.raises(ValueError, match="over input, a leaf that requires one"):
        fastattn.cross_entropy(leaf, target, inplace=True)
    with pytest.raises(ValueError, match="over a leaf that requires one: input is a view of it"):
        fastattn.cross_entropy(leaf.view(5, 7), target, inplace=True)
    with pytest.raises(ValueError, match=r"elements of input overlap, with strides \(0, 1\)"):
        fastattn.cross_entropy((2 * leaf)[:1].expand(5, 7), target, inplace=True)
    logits = 2 * leaf
    loss = fastattn.cross_entropy(logits, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hold their gradient since the first backward"):
        loss.backward()
    logits = 2 * leaf
    losses = [fastattn.cross_entropy(logits, target, inplace=True) for _ in range(2)]
    losses[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True: the logits, the target or the graph are not what"):
        losses[1].backward()
    logits = 2 * leaf
    loss = logits.square().sum() + fastattn.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the loss's backward runs first, and what the square saved is gone


def test_without_inplace_nothing_is_written(device: torch.device) -> None:
    x, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    copy, dloss = x.detach().clone(), make_tensor(5, device=device, seed=1)
    kept = dloss.clone()
    loss = fastattn.cross_entropy(x, target, reduction="none", implementation="triton")
    first = torch.autograd.grad(loss, x, dloss, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x, dloss)[0])
    assert torch.equal(x, copy) and torch.equal(dloss, kept)


def test_saves_the_logits_and_8_bytes_a_row(device: torch.device) -> None:
    x = make_tensor(5, 7, dtype=torch.bfloat16, device=device).requires_grad_()
    target = make_target(5, classes=7, device=device)
    loss = fastattn.cross_entropy(x, target, implementation="triton")
    saved = loss.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), target.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((2, 5), torch.float32), ((), torch.float32)]


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    x, target = make_tensor(64, 1000, device=device), make_target(64, classes=1000, device=device)
    results(fastattn.cross_entropy, x, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(fastattn.cross_entropy, x, target, z_loss=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
