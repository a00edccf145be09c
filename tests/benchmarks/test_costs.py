"""The formulas of benchmarks/costs.py against counts made by other means."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs
from benchmarks.cases import (
    AddLayerNormCase,
    AttentionCase,
    BiasGeluCase,
    BlockCase,
    GegluCase,
    GeluCase,
    GptCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    MlpCase,
    RMSNormCase,
    RotaryCase,
)
from fastattn import reference
from fastattn.models import GPT, TransformerConfig


class Count:
    """A number that counts the operations made on it and on its results."""

    made = 0

    def _made(self, other: object = None) -> "Count":
        Count.made += 1
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _made


def unary(x: Count) -> Count:
    """A root, exponential, erf or tanh."""
    return x._made()


def counted(function) -> int:
    Count.made = 0
    function()
    return Count.made


def mean(values: list[Count]) -> Count:
    total = Count()
    for value in values:
        total = total + value
    return total / len(values)


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


@pytest.mark.parametrize("affine", (True, False))
def test_layer_norm_flops_are_counted_by_doing_them(affine):
    width = 5
    x, dy, weight, bias, dweight, dbias = ([Count() for _ in range(width)] for _ in range(6))

    def forward_row():
        mu = mean(x)
        centred = [a - mu for a in x]
        rstd = unary(mean([c * c for c in centred]) + 1e-5)
        y = [c * rstd for c in centred]
        if affine:
            y = [a * w for a, w in zip(y, weight, strict=True)]
            y = [a + b for a, b in zip(y, bias, strict=True)]

    def backward_row():
        mu, rstd = Count(), Count()
        x_hat = [(a - mu) * rstd for a in x]
        grad = [g * w for g, w in zip(dy, weight, strict=True)] if affine else dy
        first = mean(grad)
        second = mean([g * h for g, h in zip(grad, x_hat, strict=True)])
        [(g - first - h * second) * rstd for g, h in zip(grad, x_hat, strict=True)]
        if affine:
            [total + g * h for total, g, h in zip(dweight, dy, x_hat, strict=True)]
            [total + g for total, g in zip(dbias, dy, strict=True)]

    case = LayerNormCase(3, width, affine=affine)
    assert costs.layer_norm_forward(case).flops == 3 * counted(forward_row)
    assert costs.layer_norm_backward(case).flops == 3 * counted(backward_row)


@pytest.mark.parametrize("affine", (True, False))
def test_layer_norm_bytes_are_those_of_the_tensors(affine):
    case = LayerNormCase(3, 8, affine=affine, dtype=torch.bfloat16)
    x, *parameters = case.inputs()
    statistics = 2 * 3 * torch.float32.itemsize
    parameter_bytes = sum(p.nbytes for p in parameters)
    assert costs.layer_norm_forward(case).bytes == 2 * x.nbytes + parameter_bytes
    assert costs.layer_norm_forward(case, True).bytes == 2 * x.nbytes + parameter_bytes + statistics
    # reads x, dy, the weight and the statistics; writes dx, dw and db
    weight = parameters[0].nbytes if affine else 0
    assert costs.layer_norm_backward(case).bytes == 3 * x.nbytes + weight + parameter_bytes + statistics


@pytest.mark.parametrize("affine", (True, False))
def test_rms_norm_flops_and_bytes(affine):
    width = 5
    x, dy, weight, dweight = ([Count() for _ in range(width)] for _ in range(4))

    def forward_row():
        rstd = unary(mean([a * a for a in x]) + 1e-5)
        y = [a * rstd for a in x]
        if affine:
            [a * w for a, w in zip(y, weight, strict=True)]

    def backward_row():
        rstd = Count()
        x_hat = [a * rstd for a in x]
        grad = [g * w for g, w in zip(dy, weight, strict=True)] if affine else dy
        second = mean([g * h for g, h in zip(grad, x_hat, strict=True)])
        [(g - h * second) * rstd for g, h in zip(grad, x_hat, strict=True)]
        if affine:
            [total + g * h for total, g, h in zip(dweight, dy, x_hat, strict=True)]

    case = RMSNormCase(3, width, affine=affine)
    assert costs.rms_norm_forward(case).flops == 3 * counted(forward_row)
    assert costs.rms_norm_backward(case).flops == 3 * counted(backward_row)
    x, *parameters = RMSNormCase(3, 8, affine=affine, dtype=torch.bfloat16).inputs()
    case, rstd, weight = RMSNormCase(3, 8, affine=affine, dtype=torch.bfloat16), 3 * 4, 16 if affine else 0
    assert sum(p.nbytes for p in parameters) == weight
    assert costs.rms_norm_forward(case, True).bytes == 2 * x.nbytes + weight + rstd
    # reads x, dy, the weight and rstd; writes dx and dw
    assert costs.rms_norm_backward(case).bytes == 3 * x.nbytes + 2 * weight + rstd


@pytest.mark.parametrize("residual", (None, torch.float32))
def test_add_layer_norm_is_the_norm_and_what_the_sum_moves(residual):
    case = AddLayerNormCase(3, 8, torch.bfloat16, residual)
    x, other, weight, bias = case.inputs()
    y, h = case.reference(x, other, weight, bias)
    dx, dresidual, *parameters = torch.autograd.grad((y.sum(), h.sum()), (x, other, weight, bias))
    statistics, elements = 2 * 3 * torch.float32.itemsize, 3 * 8
    plain = LayerNormCase(3, 8, dtype=torch.bfloat16)

    def size(*tensors):
        return sum(t.nbytes for t in tensors)

    forward, backward = costs.add_layer_norm_forward(case, True), costs.add_layer_norm_backward(case)
    assert forward.bytes == size(x, other, weight, bias, y, h) + statistics
    # dy and the gradient at h arrive; where x and residual have one dtype, one gradient is that of both
    written = (dx,) if residual is None else (dx, dresidual)
    assert backward.bytes == size(y, h, h, weight, *written, *parameters) + statistics
    assert forward.flops == costs.layer_norm_forward(plain).flops + elements
    assert backward.flops == costs.layer_norm_backward(plain).flops + elements
    both = costs.operation_cost(case, "forward+backward")
    assert (both.flops, both.bytes) == (forward.flops + backward.flops, forward.bytes + backward.bytes)


def test_gelu_flops_are_counted_by_doing_them():
    x, dy, c, a = (Count() for _ in range(4))

    def erf_forward():
        x * 0.5 * (1 + unary(x * c))

    def erf_backward():
        phi = 0.5 * (1 + unary(x * c))
        density = c * unary(x * x * -0.5)
        dy * (phi + x * density)

    def tanh_forward():
        0.5 * x * (1 + unary(c * (x + a * (x * x * x))))

    def tanh_backward():
        square = x * x
        t = unary(c * (x * (1 + a * square)))
        slope = c * (1 + a * square)  # the a of the derivative is 3 times that of the tanh
        dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)

    for approximate, forward, backward in (
        ("none", erf_forward, erf_backward),
        ("tanh", tanh_forward, tanh_backward),
    ):
        case = GeluCase(2, 3, approximate)
        assert costs.gelu_forward(case).flops == 6 * counted(forward)
        assert costs.gelu_backward(case).flops == 6 * counted(backward)


def test_gelu_bytes_are_those_of_the_tensors():
    case = GeluCase(4, 8, dtype=torch.float16)
    (x,) = case.inputs()
    assert costs.gelu_forward(case).bytes == 2 * x.nbytes
    assert costs.gelu_backward(case).bytes == 3 * x.nbytes


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_bias_gelu_adds_an_addition_each_way_and_the_sum_of_a_column(approximate):
    case, gelu = BiasGeluCase(2, 3, approximate), GeluCase(2, 3, approximate)
    x, dx, bias, dbias = ([Count() for _ in range(6)] for _ in range(4))

    def forward():
        [a + b for a, b in zip(x, bias, strict=True)]

    def backward():
        forward()
        [total + a for total, a in zip(dbias, dx, strict=True)]

    assert costs.bias_gelu_forward(case).flops == costs.gelu_forward(gelu).flops + counted(forward)
    assert costs.bias_gelu_backward(case).flops == costs.gelu_backward(gelu).flops + counted(backward)


def test_bias_gelu_bytes_are_those_of_the_tensors():
    case = BiasGeluCase(4, 8, dtype=torch.float16)
    x, bias = case.inputs()
    assert costs.bias_gelu_forward(case).bytes == 2 * x.nbytes + bias.nbytes
    assert costs.bias_gelu_backward(case).bytes == 3 * x.nbytes + 2 * bias.nbytes


def test_geglu_flops_are_counted_by_doing_them():
    dy, value, gate, c = (Count() for _ in range(4))

    def gelu():
        return gate * 0.5 * (1 + unary(gate * c))

    def forward():
        value * gelu()

    def backward():
        dy * gelu()
        phi, density = 0.5 * (1 + unary(gate * c)), c * unary(gate * gate * -0.5)
        (dy * value) * (phi + gate * density)

    case = GegluCase(2, 3)
    assert costs.geglu_forward(case).flops == 6 * counted(forward)
    assert costs.geglu_backward(case).flops == 6 * counted(backward)


def test_geglu_bytes_are_those_of_the_tensors():
    case = GegluCase(4, 8, dtype=torch.float16)
    (x,) = case.inputs()
    y = case.reference(x)
    assert costs.geglu_forward(case).bytes == x.nbytes + y.nbytes
    assert costs.geglu_backward(case).bytes == 2 * x.nbytes + y.nbytes
    assert costs.operation_cost(case, "forward+backward").bytes == 3 * x.nbytes + 2 * y.nbytes


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
