"""The costs of normalization against counts made by other means."""

import pytest
import torch

from benchmarks import costs
from benchmarks.cases import (
    AddLayerNormCase,
    AddRMSNormCase,
    LayerNormCase,
    RMSNormCase,
)
from tests.benchmarks.counting import Count, counted, mean, unary


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


def test_add_rms_norm_is_the_norm_and_what_the_sum_moves():
    case, plain = AddRMSNormCase(3, 8, torch.bfloat16), RMSNormCase(3, 8, dtype=torch.bfloat16)
    x, other, weight = case.inputs()
    y, h = case.reference(x, other, weight)
    rstd, elements = 3 * torch.float32.itemsize, 3 * 8
    forward, backward = costs.add_rms_norm_forward(case, True), costs.add_rms_norm_backward(case)
    assert forward.bytes == sum(t.nbytes for t in (x, other, weight, y, h)) + rstd
    # dy, the gradient at h, h and the weight are read; one gradient for x and residual, and the weight's, written
    assert backward.bytes == 4 * x.nbytes + 2 * weight.nbytes + rstd
    assert forward.flops == costs.rms_norm_forward(plain).flops + elements
    assert backward.flops == costs.rms_norm_backward(plain).flops + elements
