"""The formulas of benchmarks/costs.py against counts made by other means."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs
from benchmarks.cases import (
    AttentionCase,
    BlockCase,
    GeluCase,
    GptCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    MlpCase,
    RotaryCase,
)
from fastattn.models import GPT, TransformerConfig
from tests.benchmarks.counting import Count, counted


def test_gpt_step_flops_are_what_pytorch_counts():
    """With the scores of every pair, which is what the naive model computes: it masks them afterwards."""
    case = GptCase(layers=2, width=16, heads=2, vocabulary=32, batch=2, seq_len=8)
    config = TransformerConfig(
        vocab_size=32, max_length=8, d_model=16, n_layers=2, n_heads=2, implementation="naive"
    )
    model, tokens = GPT(config), torch.randint(32, (2, 8))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert costs.gpt_forward_flops(case, causal=False) == forward.get_total_flops()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert costs.gpt_step_flops(case, causal=False) == total


def test_gpt_step_flops_leave_out_masked_pairs():
    case = GptCase(layers=3, width=16, heads=2, vocabulary=32, batch=2, seq_len=8)
    masked = 8 * 7 // 2
    saved = 3 * 3 * 4 * 2 * masked * 16  # passes, layers, two products, batch, pairs, width
    assert costs.gpt_step_flops(case, causal=False) - costs.gpt_step_flops(case) == saved


def test_rates_and_sums():
    cost = costs.Cost(flops=6_000_000, bytes=3_000) + costs.Cost(flops=0, bytes=1_000)
    assert math.isclose(cost.tflops(2.0), 0.003)  # 6e6 in 2e-3 s are 3e9 a second
    assert math.isclose(cost.gbytes(2.0), 0.002)  # 4e3 in 2e-3 s are 2e6 a second


def test_operation_cost_adds_what_backward_needs():
    attention, norm, gelu = AttentionCase(1, 2, 4, 8), LayerNormCase(2, 8), GeluCase(2, 8)
    both = "forward+backward"
    expected = costs.attention_forward(attention, True) + costs.attention_backward(attention)
    assert costs.operation_cost(attention, both) == expected
    assert costs.operation_cost(attention, "forward") == costs.attention_forward(attention)
    expected = costs.layer_norm_forward(norm, True) + costs.layer_norm_backward(norm)
    assert costs.operation_cost(norm, both) == expected
    assert costs.operation_cost(gelu, both) == costs.gelu_forward(gelu) + costs.gelu_backward(gelu)
    assert costs.operation_cost(gelu, "forward") == costs.gelu_forward(gelu)


def counted_flops(case, direction: str) -> int:
    """Matrix products that PyTorch counts in the formula."""
    inputs = case.inputs()
    with FlopCounterMode(display=False) as counter:
        out = case.reference(*inputs)
        if direction == "forward+backward":
            out.backward(torch.ones_like(out))
    return counter.get_total_flops()


@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
def test_mlp_flops_are_those_of_its_products(direction):
    case = MlpCase(5, 8, 12)
    assert costs.operation_cost(case, direction).flops == counted_flops(case, direction)


def test_mlp_bytes_are_those_of_its_tensors():
    case = MlpCase(5, 8, 12, dtype=torch.bfloat16)
    x, *parameters = (t.nbytes for t in case.inputs())
    assert costs.mlp_forward(case).bytes == 2 * x + sum(parameters)
    assert costs.mlp_backward(case).bytes == 3 * x + 2 * sum(parameters)


def test_block_flops_are_those_of_its_products():
    """PyTorch counts all scores of the formula, the cost those that the causal mask leaves."""
    case = BlockCase(2, 6, 16, 2)
    hidden = case.batch * (6 * 6 - 6 * 7 // 2) * case.width
    assert costs.block_forward(case).flops == counted_flops(case, "forward") - 4 * hidden
    both = costs.operation_cost(case, "forward+backward").flops
    # The formula's backward has four products a score: the fifth, the scores again, is the kernels' own.
    scores = 2 * case.batch * 6 * 7 // 2 * case.width
    assert both == counted_flops(case, "forward+backward") - 12 * hidden + scores


def test_block_bytes_are_those_of_its_tensors():
    """x, dy and dx are three tensors in a backward: four were counted."""
    case = BlockCase(2, 6, 16, 2, dtype=torch.bfloat16)
    x, *parameters = (t.nbytes for t in case.inputs())
    assert costs.block_forward(case).bytes == 2 * x + sum(parameters)
    assert costs.block_backward(case).bytes == 3 * x + 2 * sum(parameters)


@pytest.mark.parametrize("rows", (5, 20, 21))
def test_loss_bytes_are_those_of_the_rows_that_count(rows):
    """A tenth of the rows is ignored: no kernel has to read them, but their gradient is written, as zeros."""
    case = LossCase(rows, 9, dtype=torch.bfloat16)
    (logits,) = case.inputs()
    targets = case.targets("cpu")
    read = logits[targets != -100]
    out = case.reference(logits)
    (grad,) = torch.autograd.grad(out, logits)
    forward = read.nbytes + targets.nbytes + out.nbytes
    assert costs.operation_cost(case, "forward").bytes == forward
    assert costs.loss_backward(case).bytes == read.nbytes + targets.nbytes + out.nbytes + grad.nbytes
    assert costs.operation_cost(case, "forward+backward").flops == 7 * read.numel()


def test_rotary_flops_are_counted_by_doing_them():
    def rotate_pair():
        x1, x2, cos, sin = (Count() for _ in range(4))
        x1 * cos - x2 * sin
        x2 * cos + x1 * sin

    case = RotaryCase(2, 3, 5, 8)
    assert costs.rotary_forward(case).flops == 2 * 3 * 5 * 4 * counted(rotate_pair)


def test_rotary_bytes_are_those_of_the_tensors():
    case = RotaryCase(2, 3, 5, 8, dtype=torch.bfloat16)
    (x,), tables = case.inputs(), case.tables()
    assert costs.rotary_forward(case).bytes == 2 * x.nbytes + sum(t.nbytes for t in tables)
    assert costs.operation_cost(case, "forward+backward").bytes == 2 * costs.rotary_forward(case).bytes


@pytest.mark.parametrize("rows", (5, 21))
def test_linear_loss_is_the_products_of_the_rows_that_count(rows):
    """PyTorch counts its products over all rows; ignored ones need none, and their gradients are written as zeros."""
    case = LinearLossCase(rows, 4, 9, dtype=torch.bfloat16)
    x, weight = case.inputs()
    kept = case.targets("cpu") != -100
    with FlopCounterMode(display=False) as counter:
        gradients = torch.autograd.grad(torch.nn.functional.linear(x[kept], weight).sum(), (x, weight))
    both = costs.operation_cost(case, "forward+backward")
    assert both.flops == counter.get_total_flops() == 3 * costs.linear_loss_forward(case).flops
    read = x[kept].nbytes + weight.nbytes + 8 * rows + 2
    assert costs.linear_loss_forward(case).bytes == read
    assert both.bytes == 2 * read + sum(g.nbytes for g in gradients)
