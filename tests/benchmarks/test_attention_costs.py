"""The costs of attention against counts made by other means."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs
from benchmarks.cases import (
    AttentionCase,
)
from fastattn import reference

ATTENTION = [
    AttentionCase(2, 3, 5, 4),
    AttentionCase(1, 2, 7, 8, causal="top_left"),
    AttentionCase(1, 2, 7, 8, causal=True),
    AttentionCase(2, 4, 6, 8, kv_heads=2, causal="bottom_right"),
    AttentionCase(1, 2, 3, 4, seq_k=9, causal="top_left"),
    AttentionCase(1, 2, 3, 4, seq_k=9, causal="bottom_right"),
    AttentionCase(1, 2, 9, 4, seq_k=3, causal="top_left"),
    AttentionCase(1, 2, 9, 4, seq_k=3, causal="bottom_right"),
    AttentionCase(1, 6, 9, 4, kv_heads=1, seq_k=3),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_pairs_are_those_of_the_mask(case):
    _, _, _, seq_q, seq_k, _ = case.shape
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool)
    if case.causal:
        mask = reference.causal_mask(seq_q, seq_k, case.causal)
    assert costs.attention_pairs(seq_q, seq_k, case.causal) == mask.sum().item()


@pytest.mark.parametrize("left", (0, 2, 5, 20))
@pytest.mark.parametrize("case", [c for c in ATTENTION if c.causal], ids=lambda case: case.name)
def test_attention_pairs_are_those_of_the_window(case, left):
    _, _, _, seq_q, seq_k, _ = case.shape
    mask = reference.window_mask(seq_q, seq_k, (left, 0), case.causal)
    assert costs.attention_pairs(seq_q, seq_k, case.causal, left) == mask.sum().item()


def test_options_count_what_they_read_and_what_they_save():
    """A bias is read once forward, read and written backward; a window of a quarter leaves as many products."""
    plain = AttentionCase(2, 3, 8, 4, causal="top_left")
    bias, window = (replace(plain, options=name) for name in ("bias", "window"))
    assert costs.attention_forward(bias).bytes - costs.attention_forward(plain).bytes == 3 * 8 * 8 * 4
    assert costs.attention_backward(bias).bytes - costs.attention_backward(plain).bytes == 2 * 3 * 8 * 8 * 4
    seen = reference.window_mask(8, 8, (2, 0), "top_left").sum().item()
    assert costs.attention_forward(window).flops == 2 * 3 * seen * 4 * 4
    assert costs.attention_forward(replace(window, causal=False)).flops == 2 * 3 * seen * 4 * 4


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_flops_are_two_for_each_product_of_each_pair(case):
    """Two products forward and five backward, each head_dim multiplications and additions a pair."""
    batch, heads, _, seq_q, seq_k, head_dim = case.shape
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool)
    if case.causal:
        mask = reference.causal_mask(seq_q, seq_k, case.causal)
    pairs = sum(1 for _ in range(batch * heads) for row in mask.tolist() for seen in row if seen)
    assert costs.attention_forward(case).flops == pairs * 2 * 2 * head_dim
    assert costs.attention_backward(case).flops == pairs * 5 * 2 * head_dim


@pytest.mark.parametrize("case", [c for c in ATTENTION if not c.causal], ids=lambda case: case.name)
def test_attention_flops_are_what_pytorch_counts(case):
    """Naive attention makes two products forward and four backward; a fused backward makes the scores again."""
    inputs = case.inputs()
    with FlopCounterMode(display=False) as forward:
        out = reference.attention(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert costs.attention_forward(case).flops == forward.get_total_flops()
    scores_again = forward.get_total_flops() // 2
    assert costs.attention_backward(case).flops == backward.get_total_flops() + scores_again


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_bytes_are_those_of_the_tensors(case):
    case = replace(case, dtype=torch.float16)
    q, k, v = case.inputs()
    out, lse = reference.attention(q, k, v, causal=case.causal, return_lse=True)
    out.sum().backward()

    def size(*tensors):
        return sum(t.nbytes for t in tensors)

    lse = lse.float()
    assert costs.attention_forward(case).bytes == size(q, k, v, out)
    assert costs.attention_forward(case, save_lse=True).bytes == size(q, k, v, out, lse)
    assert costs.attention_backward(case).bytes == size(q, k, v, out, out, lse, q.grad, k.grad, v.grad)
