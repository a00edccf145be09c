"""Peak memory on a CPU, proven with allocations of known size."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import held_by, peak_memory
from fastattn import reference

MIB = 2**20


def mib(count: float) -> torch.Tensor:
    return torch.empty(int(count * MIB), dtype=torch.uint8)


def test_peak_is_the_most_that_exists_at_one_time():
    def call():
        first, second = mib(4), mib(2)
        del first
        third = mib(3)
        return second, third

    assert peak_memory(call, "cpu") == 6 * MIB


def test_peak_counts_temporaries_that_are_released_before_the_end():
    def call():
        mib(7)
        return mib(1)

    assert peak_memory(call, "cpu") == 7 * MIB


def test_peak_is_above_what_was_there_before():
    kept = [mib(16)]

    def call():
        kept.append(mib(2))

    assert peak_memory(call, "cpu") == 2 * MIB


def test_a_call_that_allocates_nothing_peaks_at_zero():
    x = mib(1)
    assert peak_memory(lambda: x.zero_(), "cpu") == 0


def test_peak_sees_the_backward_pass():
    x = torch.randn(MIB // 4, requires_grad=True)

    def call():
        # exp keeps its result (1 MiB) for the backward, whose incoming and outgoing gradients are 1 MiB each
        y = x.exp()
        torch.autograd.grad(y, x, torch.ones_like(y))

    assert peak_memory(call, "cpu") == 3 * MIB


def test_naive_attention_is_quadratic_and_pytorchs_is_not():
    """What the demo's memory plot shows."""

    def peak(function, seq):
        q = torch.randn(1, 2, seq, 16)
        return peak_memory(lambda: function(q, q, q), "cpu")

    scores = 2 * 1024 * 1024 * 4
    assert peak(reference.attention, 1024) > 2 * scores
    assert peak(reference.attention, 1024) > 3.5 * peak(reference.attention, 512)
    assert peak(F.scaled_dot_product_attention, 1024) < scores / 2


def test_held_counts_each_storage_once():
    x = mib(2)
    assert held_by([x, x[:10], x.view(-1, 2), None, mib(1)]) == 3 * MIB


def test_held_by_tied_weights():
    head = torch.nn.Linear(8, 8, bias=False)
    assert held_by([head.weight, head.weight]) == 256


@pytest.mark.gpu
def test_peak_on_a_gpu(device):
    def call():
        torch.empty(8 * MIB, dtype=torch.uint8, device=device)

    assert peak_memory(call, device) == 8 * MIB
