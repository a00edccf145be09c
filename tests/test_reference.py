"""The oracle itself: against the formula written out score by score, and against numerical derivatives."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import reference

BATCH, HEADS, KV_HEADS, SEQ_Q, SEQ_K, HEAD_DIM = 2, 4, 2, 5, 7, 3


def score_by_score(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse of the formula in the docstring of AttentionOptions, one number at a time."""
    out = torch.zeros(*q.shape[:3], v.size(3), dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.size(1) // k.size(1))
        weights = {}
        for j in range(k.size(2)):
            score = one_score(given, q[b, h, i] @ k[b, group, j], (b, h, i, j), q.size(2), k.size(2))
            if score != -math.inf:
                weights[j] = math.exp(score)
        total = sum(weights.values())
        if given["sinks"] is not None:
            total += math.exp(given["sinks"][h])
        if total:
            lse[b, h, i] = math.log(total)
        for j, weight in weights.items():
            kept = 1.0 if given["keep"] is None else given["keep"][b, h, i, j] / (1 - given["dropout_p"])
            out[b, h, i] += weight / total * kept * v[b, group, j]
    return out, lse


def one_score(
    given: dict[str, Any], product: Tensor, place: tuple[int, int, int, int], seq_q: int, seq_k: int
) -> float:
    b, h, i, j = place
    score = given["scale"] * product.item()
    if given["softcap"]:
        score = given["softcap"] * math.tanh(score / given["softcap"])
    if given["bias"] is not None:
        score += given["bias"].expand(BATCH, HEADS, seq_q, seq_k)[b, h, i, j].item()
    if given["alibi_slopes"] is not None:
        slope = given["alibi_slopes"].expand(BATCH, HEADS)[b, h].item()
        score -= slope * abs(i + seq_k - seq_q - j)
    own = i if given["causal"] == "top_left" else i + seq_k - seq_q
    left, right = given["window"] or (None, None)
    hidden = (
        (left not in (None, -1) and j < own - left)
        or (right not in (None, -1) and j > own + right)
        or (given["causal"] and j > own)
        or (given["mask"] is not None and not given["mask"].expand(BATCH, HEADS, seq_q, seq_k)[b, h, i, j])
        or (given["key_lengths"] is not None and j >= given["key_lengths"][b])
    )
    return -math.inf if hidden else score


def random_call(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    seq_q, seq_k = r.choice([(SEQ_Q, SEQ_K), (SEQ_K, SEQ_Q), (SEQ_Q, SEQ_Q), (3, 1)])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def maybe(value: Any) -> Any:
        return value if r.random() < 0.5 else None

    def shape() -> list[int]:
        return [r.choice([1, n]) for n in (BATCH, HEADS, seq_q, seq_k)]

    keep = maybe(draw(BATCH, HEADS, seq_q, seq_k) > -0.5)
    tensors = [draw(BATCH, n, s, HEAD_DIM) for n, s in ((HEADS, seq_q), (KV_HEADS, seq_k), (KV_HEADS, seq_k))]
    return tensors, dict(
        causal=r.choice([False, "top_left", "bottom_right"]),
        window=maybe((r.choice([None, -1, 0, 2]), r.choice([None, -1, 0, 1]))),
        scale=0.7,
        bias=maybe(draw(*shape())),
        mask=maybe(draw(*shape()) > -0.5),
        softcap=maybe(0.8),
        alibi_slopes=maybe(draw(*r.choice([(HEADS,), (1, HEADS), (BATCH, HEADS)])).abs()),
        sinks=maybe(draw(HEADS)),
        key_lengths=maybe(torch.tensor([2, seq_k])),
        keep=keep,
        dropout_p=0.0 if keep is None else 0.3,
    )


@pytest.mark.parametrize("seed", range(40))
def test_attention_is_the_formula(seed: int) -> None:
    (q, k, v), given = random_call(seed)
    out, lse = reference.attention(q, k, v, **given, return_lse=True)
    expected_out, expected_lse = score_by_score(q, k, v, given)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(reference.attention(q, k, v, **given), expected_out)


@pytest.mark.parametrize("seed", range(0, 40, 8))
def test_attention_has_first_and_second_derivatives(seed: int) -> None:
    """Also where rows are fully masked; numbers from finite differences."""
    tensors, given = random_call(seed)
    names = [n for n in ("bias", "sinks", "alibi_slopes") if given[n] is not None]
    leaves = [t[:1, :, :2].clone().requires_grad_() for t in tensors]
    given = {n: small(n, t) if isinstance(t, Tensor) else t for n, t in given.items()}
    extra = [given[n].clone().requires_grad_() for n in names]

    def run(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        changed = {**given, **dict(zip(names, others, strict=True))}
        out, lse = reference.attention(q, k, v, **changed, return_lse=True)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    assert torch.autograd.gradcheck(run, (*leaves, *extra))
    assert torch.autograd.gradgradcheck(run, (*leaves, *extra))


def small(name: str, tensor: Tensor) -> Tensor:
    """The part of an option that belongs to the first batch and the first two rows and keys."""
    if name == "sinks" or (name == "alibi_slopes" and tensor.dim() == 1):
        return tensor
    return tensor[:1] if tensor.dim() < 4 else tensor[:1, :, :2, :2]


@pytest.mark.parametrize("how", ["mask", "bias", "causal", "window", "key_lengths"])
def test_a_fully_masked_row_has_no_gradient(how: str) -> None:
    """Not even where lse's own gradient is NaN; without keys that it sees, softmax and logsumexp divide 0 by 0."""
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3, 3))
    hidden = torch.zeros(1, 1, 6, 3, dtype=torch.bool)
    hidden[:, :, 1] = True
    given: dict[str, Any] = {
        "mask": dict(mask=~hidden),
        "bias": dict(bias=torch.zeros(1, 1, 6, 3).double().masked_fill(hidden, -math.inf).requires_grad_()),
        "causal": dict(causal="bottom_right"),
        "window": dict(window=(1, 0)),
        "key_lengths": dict(key_lengths=torch.tensor([0])),
    }[how]
    out, lse = reference.attention(q, k, v, **given, return_lse=True)
    unseen = lse == -math.inf
    assert unseen[0, 0, 1]
    assert not out[unseen].any()
    dlse = torch.ones_like(lse).masked_fill(unseen, math.nan)
    leaves = [q, k, v, *(t for t in given.values() if isinstance(t, Tensor) and t.requires_grad)]
    gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][unseen].any()


def test_dropout_is_drawn_without_a_keep_mask() -> None:
    q, k, v = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 100, 4), torch.ones(1, 1, 100, 4)
    torch.manual_seed(0)
    out = reference.attention(q, k, v, dropout_p=0.5)
    assert abs(out.mean().item() - 1.0) < 0.05
    assert out.std().item() > 0.01
    for keep in (None, torch.ones(1, 1, 200, 100, dtype=torch.bool)):
        assert not reference.attention(q, k, v, dropout_p=1.0, keep=keep).any()


def test_varlen_is_attention_of_each_sequence() -> None:
    q, k, v = (torch.randn(9, n, 4, dtype=torch.float64) for n in (4, 2, 2))
    rows, keys = torch.tensor([1, 3, 3, 8]), torch.tensor([0, 4, 5, 8])
    given = dict(causal="bottom_right", softcap=2.0, sinks=torch.randn(4))
    per_sequence = dict(
        bias=torch.randn(3, 1, 5, 4),
        mask=torch.rand(1, 4, 1, 4) > 0.3,
        alibi_slopes=torch.rand(3, 4),
        key_lengths=torch.tensor([3, 1, 2]),
        keep=torch.rand(3, 4, 5, 4) > 0.2,
    )
    options = dict(**given, **per_sequence, dropout_p=0.2)
    out, lse = reference.attention_varlen(q, k, v, rows, keys, **options, return_lse=True)
    for n, (i, j) in enumerate(
        [(slice(1, 3), slice(0, 4)), (slice(3, 3), slice(4, 5)), (slice(3, 8), slice(5, 8))]
    ):
        sizes = (i.stop - i.start, j.stop - j.start)
        expected_out, expected_lse = reference.attention(
            q[i].transpose(0, 1)[None],
            k[j].transpose(0, 1)[None],
            v[j].transpose(0, 1)[None],
            **given,
            bias=per_sequence["bias"][n : n + 1, :, : sizes[0], : sizes[1]],
            mask=per_sequence["mask"][..., : sizes[1]],
            alibi_slopes=per_sequence["alibi_slopes"][n],
            key_lengths=per_sequence["key_lengths"][n : n + 1],
            keep=per_sequence["keep"][n : n + 1, :, : sizes[0], : sizes[1]],
            dropout_p=0.2,
            return_lse=True,
        )
        torch.testing.assert_close(out[i], expected_out[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, i], expected_lse[0])
    assert not out[[0, 8]].any()
    assert (lse[:, [0, 8]] == -math.inf).all()
    assert torch.equal(reference.attention_varlen(q, k, v, rows, keys, **options), out)
