"""fastattn.layer_norm, through every implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import dispatch
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")
ALL = (*FAST, "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXTURES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")]
SHAPES = {
    "2d": ((5, 63), (63,)),
    "3d": ((2, 3, 127), (127,)),
    "two-dimensions": ((2, 2, 3, 5), (3, 5)),
    "everything": ((3, 5), (3, 5)),
    "width-1": ((4, 1), (1,)),
}


def leaves(
    shape: tuple[int, ...], normalized: tuple[int, ...], dtype: str, parameters: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias that require gradients."""
    return (
        make_tensor(*shape, dtype=DTYPES[dtype], device=device, requires_grad=True, seed=0),
        make_tensor(*normalized, dtype=DTYPES[parameters], device=device, requires_grad=True, seed=1),
        make_tensor(*normalized, dtype=DTYPES[parameters], device=device, requires_grad=True, seed=2),
    )


def results(function: Any, inputs: tuple[Tensor, ...], dy: Tensor, dtype: torch.dtype | None = None) -> Any:
    """y, dx, dweight and dbias of `function(x, weight, bias)`, in the inputs' dtypes or in `dtype`."""
    inputs = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs)
    y = function(*inputs)
    return (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, parameters", MIXTURES, ids=["-".join(pair) for pair in MIXTURES])
@pytest.mark.parametrize("shape, normalized", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(
    shape: tuple[int, ...],
    normalized: tuple[int, ...],
    dtype: str,
    parameters: str,
    implementation: str,
    device: torch.device,
) -> None:
    """y and every gradient. The peer is PyTorch's own function, in float32 where it takes no such mixture."""
    inputs = leaves(shape, normalized, dtype, parameters, device)
    dy = make_tensor(*shape, dtype=DTYPES[dtype], device=device, seed=3)
    found = results(
        lambda x, w, b: fastattn.layer_norm(x, normalized, w, b, implementation=implementation), inputs, dy
    )
    peer = results(
        lambda x, w, b: F.layer_norm(x, normalized, w, b),
        inputs,
        dy,
        torch.float32 if dtype != parameters else None,
    )
    truth = results(
        lambda x, w, b: fastattn.reference.layer_norm(x, normalized, w, b), inputs, dy, torch.float64
    )
    rows = math.prod(shape) // math.prod(normalized)
    for name, ours, theirs, true in zip(("y", "dx", "dweight", "dbias"), found, peer, truth, strict=True):
        growth = math.sqrt(rows) if name in ("dweight", "dbias") else 1.0
        expected = DTYPES[parameters if name in ("dweight", "dbias") else dtype]
        assert_accurate(ours, theirs.to(expected), true, name=name, growth=growth)


@pytest.mark.parametrize("implementation", ALL)
def test_output_is_contiguous_as_pytorchs(implementation: str, device: torch.device) -> None:
    x = make_tensor(2, 5, 3, 8, device=device).transpose(1, 2)
    y = fastattn.layer_norm(x, 8, implementation=implementation)
    expected = F.layer_norm(x, (8,))
    torch.testing.assert_close(y, expected)
    if implementation != "reference":
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("normalized", [12, (12,), [12], torch.Size([12])], ids=lambda n: type(n).__name__)
def test_normalized_shape_is_an_int_or_any_sequence(
    normalized: Any, implementation: str, device: torch.device
) -> None:
    x = make_tensor(3, 12, device=device)
    found = fastattn.layer_norm(x, normalized, implementation=implementation)
    torch.testing.assert_close(found, F.layer_norm(x, (12,)))


def test_takes_pytorchs_arguments_in_its_order(device: torch.device) -> None:
    x, weight, bias = leaves((4, 6), (6,), "fp32", "fp32", device)
    torch.testing.assert_close(
        fastattn.layer_norm(x, [6], weight, bias, 0.5), F.layer_norm(x, [6], weight, bias, 0.5)
    )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("needed", ["x", "w", "b", "xw", "wb"])
def test_frozen_inputs_get_no_gradient(needed: str, implementation: str, device: torch.device) -> None:
    inputs = leaves((4, 6), (6,), "fp32", "fp32", device)
    expected = results(lambda x, w, b: F.layer_norm(x, (6,), w, b), inputs, torch.ones(4, 6, device=device))
    for name, tensor in zip("xwb", inputs, strict=True):
        tensor.requires_grad_(name in needed)
    fastattn.layer_norm(inputs[0], 6, *inputs[1:], implementation=implementation).sum().backward()
    for name, tensor, gradient in zip("xwb", inputs, expected[1:], strict=True):
        if name in needed:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int], implementation: str, device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    y = fastattn.layer_norm(x, shape[1], weight, implementation=implementation)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("implementation", FAST)
def test_incoming_gradient_and_inputs_are_not_written(implementation: str, device: torch.device) -> None:
    inputs = leaves((4, 6), (6,), "fp32", "fp32", device)
    dy = make_tensor(4, 6, device=device, seed=3)
    tensors = [t.detach() for t in (*inputs, dy)]
    before = [t.clone() for t in tensors]
    y = fastattn.layer_norm(inputs[0], 6, *inputs[1:], implementation=implementation)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("parameters", ["fp32", "bf16", None])
def test_second_derivatives(parameters: str | None, implementation: str, device: torch.device) -> None:
    """Derivatives of sums of first gradients with fixed random weights, against those of float64."""
    x, weight, bias = leaves((4, 9), (9,), "fp32", parameters or "fp32", device)
    dy = make_tensor(4, 9, device=device, requires_grad=True, seed=3)

    def second(function: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *given, dy = inputs
        given = given if parameters else []
        first = torch.autograd.grad(function(x, *given), (x, *given), dy, create_graph=True)
        factors = [make_tensor(*g.shape, dtype=g.dtype, device=device, seed=4) for g in first]
        total = sum((g * f).sum() for g, f in zip(first, factors, strict=True))
        return torch.autograd.grad(total, (x, *given[:1], dy))

    inputs = (x, weight, bias, dy)
    found = second(lambda x, *wb: fastattn.layer_norm(x, 9, *wb, implementation=implementation), inputs)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = second(lambda x, *wb: fastattn.reference.layer_norm(x, (9,), *wb), wide)
    tolerance = 2e-2 if parameters == "bf16" else 1e-4
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=tolerance, rtol=tolerance)


def test_fp32_parameter_gradients_of_bf16_rows_are_summed_in_fp32() -> None:
    """PyTorch's CPU operator sums them in bfloat16 where it is given the mixture: 4 % off after 1,000 rows."""
    x, weight, bias = leaves((1000, 32), (32,), "bf16", "fp32", torch.device("cpu"))
    found = torch.autograd.grad(
        fastattn.layer_norm(x, 32, weight, bias, implementation="torch").sum(), (weight, bias)
    )
    expected = torch.autograd.grad(F.layer_norm(x.float(), (32,), weight, bias).sum(), (weight, bias))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_torch_implementation_takes_float64() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.ones(5)
    assert torch.equal(fastattn.layer_norm(x, 5), F.layer_norm(x, (5,)))
    mixed = fastattn.layer_norm(x, 5, weight)
    assert torch.equal(mixed, F.layer_norm(x, (5,), weight.double()))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "mark-dynamic"])
def test_compiles_whole_with_dynamic_shapes(
    dynamic: bool | None, implementation: str, device: torch.device
) -> None:
    """One graph, forward and backward, serves several numbers of rows; weight and bias may be one tensor.

    The first call may be compiled twice: the compiler first takes eps for a dynamic number, then specializes.
    """
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return fastattn.layer_norm(x, x.shape[-1], weight, weight, implementation=implementation)

    compiled = torch.compile(norm, fullgraph=True, backend=frames, dynamic=dynamic)
    weight = make_tensor(17, device=device, requires_grad=True, seed=1)
    compilations = []
    for rows in (5, 7, 16):
        x = make_tensor(2, rows, 17, device=device, requires_grad=True)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 1)
        y = compiled(x, weight)
        torch.testing.assert_close(y, norm(x, weight))
        found = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = torch.autograd.grad(norm(x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(found, expected)
        compilations.append(frames.frame_count)
    assert len(set(compilations)) == 1


def test_compiles_whole_without_gradients(device: torch.device) -> None:
    x, weight, bias = leaves((3, 8), (8,), "bf16", "fp32", device)
    compiled = torch.compile(
        lambda: fastattn.layer_norm(x, 8, weight, bias, implementation="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(), fastattn.layer_norm(x, 8, weight, bias))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_autocast_matches_pytorch(
    dtype: str, autocast: torch.dtype, implementation: str, device: torch.device
) -> None:
    """The CPU's autocast leaves LayerNorm alone; a GPU's computes and returns float32."""
    x, weight, bias = leaves((4, 9), (9,), dtype, dtype, device)
    with torch.autocast(device.type, dtype=autocast):
        expected = F.layer_norm(x, (9,), weight, bias)
        y = fastattn.layer_norm(x, 9, weight, bias, implementation=implementation)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert [gradient.dtype for gradient in found] == [DTYPES[dtype]] * 3
    torch.testing.assert_close(found, torch.autograd.grad(expected.float().square().sum(), (x, weight, bias)))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_gpu_autocast_gives_float32_but_float64(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own dispatcher says what its function returns, of tensors on a GPU that need not be there."""
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    ours, theirs = getattr(fastattn, name), getattr(F, name)
    on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            weight = torch.ones(4, device="cuda")
            for dtype in (torch.float16, torch.float32, torch.float64):
                x = torch.empty(2, 4, dtype=dtype, device="cuda")
                if implementation == "triton" and dtype == torch.float64:
                    continue
                y = ours(x, 4, weight, implementation=implementation)
                assert y.dtype == theirs(x, (4,), weight).dtype
                bf16 = torch.bfloat16
                assert ours(x, 4, weight, out_dtype=bf16, implementation=implementation).dtype == bf16
                add = getattr(fastattn, f"add_{name}")
                y, h = add(x, x.half(), 4, weight, implementation=implementation)
                assert (y.dtype, h.dtype) == (theirs(x, (4,), weight).dtype, torch.float16)
                y, h = add(x, None, 4, weight, out_dtype=bf16, implementation=implementation)
                assert (y.dtype, h.dtype) == (bf16, dtype)
    finally:
        torch.set_autocast_enabled("cuda", on)


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    inputs = leaves((4, 9), (9,), "fp32", "fp32", device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastattn.layer_norm(x, 9, weight, bias, implementation=implementation)

    plain = torch.autograd.grad(norm(*inputs).square().sum(), inputs)
    kept = torch.utils.checkpoint.checkpoint(norm, *inputs, use_reentrant=False)
    recomputed = torch.autograd.grad(kept.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_saves_x_weight_and_float32_statistics(device: torch.device) -> None:
    """No copy of x, no x-hat: besides x and weight, 8 bytes a row."""
    x, weight, bias = leaves((6, 9), (9,), "bf16", "bf16", device)
    y = fastattn.layer_norm(x, 9, weight, bias, implementation="triton")
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((6,), torch.float32)] * 2


def test_explain_names_every_refusal(device: torch.device) -> None:
    explanation = fastattn.explain(fastattn.layer_norm, torch.randn(2, 4, device=device), 4)
    assert explanation.implementation == "triton"
    assert explanation.refusals["torch"] == "'triton' comes first"
    double = fastattn.explain(fastattn.layer_norm, torch.randn(2, 4, dtype=torch.float64), 4)
    assert double.implementation == "torch"
    assert "float64 is not one of" in double.refusals["triton"]
    parameter = fastattn.explain(
        fastattn.layer_norm, torch.randn(2, 4, device=device), 4, None, torch.zeros(4, device=device).double()
    )
    assert "float64 is not one of" in parameter.refusals["triton"]


def test_forced_implementation_that_cannot_says_why() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(fastattn.NotSupported, match=r"implementation='triton': dtype=torch.float64 is not"):
        fastattn.layer_norm(x, 4, implementation="triton")
    with pytest.raises(fastattn.NotSupported, match=r"torch: dtype=torch.float8_e5m2 is not one of"):
        fastattn.layer_norm(x.to(torch.float8_e5m2), 4)


X = torch.randn(2, 3, 4)
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-not-a-tensor": ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor, not list"),
    "weight-not-a-tensor": ({"weight": 1.0}, TypeError, r"weight must be a torch.Tensor, not float"),
    "integers": ({"x": X.long()}, TypeError, r"x has dtype=torch.int64; a floating-point dtype"),
    "integer-weight": ({"weight": X[0, 0].int()}, TypeError, r"weight has dtype=torch.int32; a floating"),
    "complex": ({"x": X.cfloat()}, TypeError, r"x has dtype=torch.complex64; a floating-point dtype"),
    "no-dimension": ({"normalized_shape": ()}, ValueError, r"normalized_shape=\(\) must have at least one"),
    "scalar": (
        {"x": torch.tensor(1.0), "normalized_shape": 1},
        ValueError,
        r"normalized_shape=\(1,\) must be the last 1 dimensions of x, which has shape \(\)",
    ),
    "width": (
        {"normalized_shape": 3},
        ValueError,
        r"normalized_shape=\(3,\) must be the last 1 dimensions of x, which has shape \(2, 3, 4\)",
    ),
    "rank": (
        {"normalized_shape": [1, 2, 3, 4]},
        ValueError,
        r"normalized_shape=\(1, 2, 3, 4\) must be the last 4 dimensions of x",
    ),
    "float-size": ({"normalized_shape": (4.0,)}, TypeError, r"\(4.0,\) holds 4.0, which is not an int"),
    "bool-size": ({"normalized_shape": True}, TypeError, r"\(True,\) holds True, which is not an int"),
    "tensor-size": (
        {"normalized_shape": torch.tensor([4])},
        TypeError,
        r"normalized_shape must be an int or a sequence of ints, not Tensor",
    ),
    "weight-shape": (
        {"weight": torch.ones(3)},
        ValueError,
        r"weight has shape \(3,\), not normalized_shape=\(4,\)",
    ),
    "flat-weight": (
        {"normalized_shape": (3, 4), "weight": torch.ones(12)},
        ValueError,
        r"weight has shape \(12,\), not normalized_shape=\(3, 4\)",
    ),
    "bias-shape": (
        {"bias": torch.ones(4, 1)},
        ValueError,
        r"bias has shape \(4, 1\), not normalized_shape=\(4,\)",
    ),
    "weight-device": ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight is on meta, but x is"),
    "bias-device": ({"bias": torch.ones(4, device="meta")}, ValueError, r"bias is on meta, but x is on cpu"),
    "eps": ({"eps": "small"}, TypeError, r"eps must be a float, not str"),
    "implementation": (
        {"implementation": "foo"},
        ValueError,
        r"implementation='foo' is unknown; fastattn.layer_norm has 'triton', 'torch', 'reference'",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "normalized_shape": 4} | change
    with pytest.raises(error, match=message):
        fastattn.layer_norm(**arguments)


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
@pytest.mark.parametrize("shape", [np.int64(4), (np.int32(4),), torch.Size([4]), range(4, 5)], ids=repr)
def test_sizes_of_any_integral_type(shape: Any, implementation: str, device: torch.device) -> None:
    x = make_tensor(3, 4, device=device)
    torch.testing.assert_close(
        fastattn.layer_norm(x, shape, implementation=implementation), F.layer_norm(x, (4,))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, parameters", MIXTURES, ids=["-".join(pair) for pair in MIXTURES])
@pytest.mark.parametrize("rows, width", [(8192, 768), (4096, 4096), (256, 131072)])
def test_real_sizes(rows: int, width: int, dtype: str, parameters: str, device: torch.device) -> None:
    test_matches_reference((rows, width), (width,), dtype, parameters, "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor"])
def test_compiles_with_inductor(backend: str, device: torch.device) -> None:
    inputs = leaves((64, 768), (768,), "bf16", "fp32", device)
    norm = torch.compile(
        lambda x, w, b: F.gelu(fastattn.layer_norm(x, 768, w, b, implementation="triton")),
        fullgraph=True,
        backend=backend,
    )
    found = results(norm, inputs, torch.ones(64, 768, device=device))
    expected = results(
        lambda x, w, b: F.gelu(fastattn.layer_norm(x, 768, w, b)), inputs, torch.ones(64, 768, device=device)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=2e-2)
