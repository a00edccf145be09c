"""The costs of activations, alone and gated, against counts made by other means."""

import pytest
import torch

from benchmarks import costs
from benchmarks.cases import (
    BiasGeluCase,
    GegluCase,
    GeluCase,
    SwigluCase,
)
from tests.benchmarks.counting import Count, counted, unary


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


def test_swiglu_flops_are_counted_by_doing_them():
    dy, value, gate = (Count() for _ in range(3))

    def sigmoid():
        return 1 / (1 + unary(gate))  # a sign is no operation

    def forward():
        value * (gate * sigmoid())

    def backward():
        s = sigmoid()
        silu = gate * s
        dy * silu
        (dy * value) * (s + silu * (1 - s))

    case = SwigluCase(2, 3)
    assert costs.swiglu_forward(case).flops == 6 * counted(forward)
    assert costs.swiglu_backward(case).flops == 6 * counted(backward)


def test_swiglu_bytes_are_those_of_the_tensors():
    case = SwigluCase(4, 8, dtype=torch.float16)
    (x,) = case.inputs()
    y = case.reference(x)
    assert costs.swiglu_forward(case).bytes == x.nbytes + y.nbytes
    assert costs.swiglu_backward(case).bytes == 2 * x.nbytes + y.nbytes
    assert costs.operation_cost(case, "forward+backward").bytes == 3 * x.nbytes + 2 * y.nbytes
