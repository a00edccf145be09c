"""fastattn.gelu, through every implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")
FORMS = ("none", "tanh", "quick")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """PyTorch's function, which has no quick form, and what its users write for that."""
    return x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)


def check_gelu(x: Tensor, approximate: str, implementation: str) -> None:
    """Forward and gradient against float64, at most twice PyTorch's own error in the same dtype."""
    dy = make_tensor(*x.shape, dtype=x.dtype, device=x.device, seed=9)

    def both(function: object, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = function(x, approximate=approximate, **options)
        return y, torch.autograd.grad(y, x, dy.to(x.dtype))[0]

    actual = both(fastattn.gelu, x, implementation=implementation)
    for name, found, peer, truth in zip(
        ("y", "dx"), actual, both(torch_gelu, x), both(fastattn.reference.gelu, x.double()), strict=True
    ):
        assert_accurate(found, peer, truth, name=name)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(), (1,), (63,), (3, 5, 127), (1025,)], ids=str)
def test_matches_reference(
    shape: tuple[int, ...], dtype: torch.dtype, approximate: str, implementation: str, device: torch.device
) -> None:
    check_gelu(3 * make_tensor(*shape, dtype=dtype, device=device), approximate, implementation)


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "every-other-column": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5),
    "channels-last": lambda x: x.reshape(1, 4, 3, -1).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(layout: object, implementation: str, device: torch.device) -> None:
    x = layout(make_tensor(12, 10, device=device))
    check_gelu(x, "none", implementation)
    assert fastattn.gelu(x, implementation=implementation).stride() == F.gelu(x).stride()


def test_gaps_are_not_read(device: torch.device) -> None:
    x = make_tensor(7, 9, device=device, strides=(20, 2))
    assert fastattn.gelu(x, implementation="triton").isfinite().all()


@pytest.mark.parametrize("approximate", FORMS)
def test_extreme_values_match_pytorch(approximate: str, device: torch.device) -> None:
    """Where the cubic overflows, or erf and sigmoid saturate, neither value nor slope may turn into NaN."""
    large = torch.tensor([-1e30, -1e4, 1e4, 1e30, math.inf], device=device, requires_grad=True)
    y, slope = _with_slope(fastattn.gelu, large, approximate)
    assert torch.equal(y.detach(), torch.relu(large.detach()))
    # PyTorch's own slope of the tanh form is NaN at 1e30; the limit is 0 or 1.
    assert torch.equal(slope, (large > 0).float())
    x = torch.tensor([-88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, math.nan], device=device, requires_grad=True)
    for actual, expected in zip(
        _with_slope(fastattn.gelu, x, approximate), _with_slope(torch_gelu, x, approximate), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


def _with_slope(function: object, x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    y = function(x, approximate=approximate)
    return y, torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str, device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    y = fastattn.gelu(x, implementation=implementation)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("approximate", FORMS)
def test_double_backward(approximate: str, implementation: str, device: torch.device) -> None:
    """The second derivative, and the mixed one with the incoming gradient, are PyTorch's."""
    x = make_tensor(20, device=device, requires_grad=True)
    dy = make_tensor(20, device=device, seed=1, requires_grad=True)

    def second(function: object, **options: object) -> tuple[Tensor, ...]:
        y = function(x, approximate=approximate, **options)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, dy))

    for actual, expected in zip(
        second(fastattn.gelu, implementation=implementation), second(torch_gelu), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_inputs_and_gradients_are_not_written(device: torch.device) -> None:
    x, dy = make_tensor(100, device=device, requires_grad=True), make_tensor(100, device=device, seed=1)
    kept_x, kept_dy = x.detach().clone(), dy.clone()
    y = fastattn.gelu(x, implementation="triton")
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    second = torch.autograd.grad(y, x, dy)[0]
    assert torch.equal(first, second)
    assert torch.equal(x, kept_x) and torch.equal(dy, kept_dy)


@pytest.mark.parametrize("approximate", FORMS)
def test_opcheck(approximate: str, device: torch.device) -> None:
    x = make_tensor(5, 8, device=device).t()
    torch.library.opcheck(torch.ops.fastattn.gelu_forward.default, (x, approximate))
    torch.library.opcheck(torch.ops.fastattn.gelu_backward.default, (x.contiguous(), x, approximate))


def test_compiles_whole_with_dynamic_shapes(device: torch.device) -> None:
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: fastattn.gelu(x, implementation="triton"), fullgraph=True, backend=frames, dynamic=True
    )
    for length in (5, 40, 77):
        x = make_tensor(3, length, device=device, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, F.gelu(x))
        expected = torch.autograd.grad(F.gelu(x).square().sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    assert frames.frame_count == 1
    assert "fastattn.gelu_forward" in _graph_operators(compiled, x)


def test_the_compiler_is_left_to_fuse_a_lone_gelu(device: torch.device) -> None:
    """Unforced and under torch.compile, the operator is PyTorch's own, which the compiler sees through."""
    operators = _graph_operators(lambda x: fastattn.gelu(x), make_tensor(9, device=device))
    assert "fastattn.gelu_forward" not in operators and "gelu" in operators


def _graph_operators(function: object, x: Tensor) -> str:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    inner = getattr(function, "_torchdynamo_orig_callable", function)
    torch.compile(inner, fullgraph=True, backend=backend)(x.detach())
    return "\n".join(seen)


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_leaves_the_dtype_alone(implementation: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = make_tensor(8, dtype=dtype, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert fastattn.gelu(x, implementation=implementation).dtype == F.gelu(x).dtype == dtype


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    x = make_tensor(30, device=device, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        return fastattn.gelu(x, implementation=implementation)

    plain = torch.autograd.grad(apply(x).square().sum(), x)[0]
    kept = torch.utils.checkpoint.checkpoint(apply, x, use_reentrant=False)
    assert torch.equal(plain, torch.autograd.grad(kept.square().sum(), x)[0])


def test_bad_input_names_the_value() -> None:
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, not float"):
        fastattn.gelu(1.0)
    with pytest.raises(TypeError, match=r"x has dtype=torch.int64; a floating-point dtype is needed"):
        fastattn.gelu(torch.arange(3))
    with pytest.raises(ValueError, match=r"approximate='foo' must be 'none', 'tanh' or 'quick'"):
        fastattn.gelu(torch.ones(3), approximate="foo")
    with pytest.raises(
        ValueError, match=r"implementation='cuda' is unknown; fastattn.gelu has 'triton', 'torch'"
    ):
        fastattn.gelu(torch.ones(3), implementation="cuda")
    with pytest.raises(fastattn.NotSupported, match=r"dtype=torch.float64 is not one of|not on a GPU"):
        fastattn.gelu(torch.ones(3, dtype=torch.float64), implementation="triton")
