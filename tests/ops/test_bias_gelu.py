"""fastattn.bias_gelu, through every implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.ops.comparison import (
    CHECKS_OF_ARGUMENTS,
    assert_as_accurate,
    assert_compiles_whole,
    assert_second_derivatives_agree,
    results,
)

FAST = ("triton", "torch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    total = x + bias
    if approximate == "quick":
        return total * torch.sigmoid(1.702 * total)
    return F.gelu(total, approximate=approximate)


def check(x: Tensor, bias: Tensor, approximate: str, implementation: str) -> None:
    ours = partial(fastattn.bias_gelu, approximate=approximate, implementation=implementation)
    theirs = partial(torch_bias_gelu, approximate=approximate)
    truth = partial(fastattn.reference.bias_gelu, approximate=approximate)
    rows = x.numel() // max(1, x.size(-1))
    assert_as_accurate(
        results(ours, (x, bias)),
        results(theirs, (x, bias.to(x.dtype))),
        results(truth, (x.double(), bias.double())),
        growth=math.sqrt(max(1, rows)),
    )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_matches_reference(
    dtype: torch.dtype, approximate: str, implementation: str, device: torch.device
) -> None:
    """127 columns are two tiles, 33 rows more than one block a program."""
    x = 2 * make_tensor(3, 11, 127, dtype=dtype, device=device)
    check(x, make_tensor(127, dtype=dtype, device=device, seed=1), approximate, implementation)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(1,), (63,), (1, 1), (130, 1), (2, 64)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], implementation: str, device: torch.device) -> None:
    check(
        make_tensor(*shape, device=device),
        make_tensor(shape[-1], device=device, seed=1),
        "none",
        implementation,
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "columns-first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "part-of-a-row": lambda x: x[..., 2:-3],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "every-other-column": lambda x: x[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x = layout(make_tensor(3, 4, 20, device=device))
    check(x, make_tensor(2, x.size(-1), device=device, seed=1).t()[:, 1], "none", "triton")


def test_gaps_are_not_read(device: torch.device) -> None:
    x, bias = make_tensor(7, 9, device=device, strides=(20, 1)), make_tensor(9, device=device, seed=1)
    for result in results(partial(fastattn.bias_gelu, implementation="triton"), (x, bias)):
        assert result.isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
def test_a_bias_of_another_dtype(implementation: str, device: torch.device) -> None:
    """As it is kept in mixed precision: y has x's dtype, the gradient the bias's, of sums in float32."""
    x = make_tensor(70, 9, dtype=torch.bfloat16, device=device)
    bias = make_tensor(9, device=device, seed=1)
    y, dx, dbias = results(partial(fastattn.bias_gelu, implementation=implementation), (x, bias))
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    truth = results(fastattn.reference.bias_gelu, (x.double(), bias.double()))[2]
    torch.testing.assert_close(dbias, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str, device: torch.device) -> None:
    x, bias = torch.empty(shape, device=device), make_tensor(shape[-1], device=device)
    y, dx, dbias = results(partial(fastattn.bias_gelu, implementation=implementation), (x, bias))
    assert y.shape == dx.shape == shape and torch.equal(dbias, torch.zeros_like(bias))


def test_extreme_values(device: torch.device) -> None:
    x = torch.tensor([[-1e30, -1e4, 1e4, 1e30, math.inf, math.nan]], device=device)
    for form in ("none", "tanh", "quick"):
        ours = partial(fastattn.bias_gelu, approximate=form, implementation="triton")
        y, dx, dbias = results(ours, (x, torch.ones(6, device=device)))
        torch.testing.assert_close(y, torch.relu(x + 1), equal_nan=True)
        assert dx[0, :5].isfinite().all() and dx[0, 5].isnan() and torch.equal(dbias[:5], dx[0, :5])


def test_gradients_are_made_only_where_they_are_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    backward = fastattn.ops.bias_gelu.bias_activation_backward

    def watched(*arguments: object) -> object:
        asked.append(arguments[4:])
        return backward(*arguments)

    monkeypatch.setattr(fastattn.ops.bias_gelu, "bias_activation_backward", watched)
    for wanted in ((True, False), (False, True)):
        x = make_tensor(5, 8, device=device, requires_grad=wanted[0])
        bias = make_tensor(8, device=device, seed=1, requires_grad=wanted[1])
        fastattn.bias_gelu(x, bias, implementation="triton").sum().backward()
        assert (x.grad is not None, bias.grad is not None) == wanted
    assert asked == [(True, None, False), (False, torch.float32, False)]


def test_two_runs_give_the_same_bits_and_write_no_input(device: torch.device) -> None:
    x, bias = make_tensor(50, 70, device=device), make_tensor(70, device=device, seed=1)
    kept = x.clone(), bias.clone()
    ours = partial(fastattn.bias_gelu, implementation="triton")
    first, second = results(ours, (x, bias)), results(ours, (x, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, kept[0]) and torch.equal(bias, kept[1])


@pytest.mark.parametrize("implementation", FAST)
def test_double_backward(implementation: str, device: torch.device) -> None:
    tensors = make_tensor(4, 6, device=device), make_tensor(6, device=device, seed=1)
    assert_second_derivatives_agree(
        partial(fastattn.bias_gelu, implementation=implementation), torch_bias_gelu, tensors
    )


def test_opcheck(device: torch.device) -> None:
    x, bias = make_tensor(5, 2, 8, device=device).transpose(0, 1), make_tensor(8, device=device, seed=1)
    check = torch.library.opcheck
    check(torch.ops.fastattn.bias_activation_forward.default, (x, bias, "gelu"))
    backward = torch.ops.fastattn.bias_activation_backward.default
    check(backward, (x, x, bias, "silu", True, torch.float32, False))
    for needs in ((False, torch.float32, False), (True, None, True)):
        check(backward, (x, x, bias, "silu", *needs), test_utils=CHECKS_OF_ARGUMENTS)


def test_compiles_whole_with_dynamic_shapes(device: torch.device) -> None:
    inputs = [
        (make_tensor(3, length, 8, device=device), make_tensor(8, device=device, seed=1)) for length in (2, 5)
    ]
    graph = assert_compiles_whole(lambda x, bias: fastattn.bias_gelu(x, bias), torch_bias_gelu, inputs)
    assert "fastattn.bias_activation_forward" in graph or "bias_gelu" in graph.lower()


def test_the_compiler_takes_over_without_a_gradient_of_the_bias(device: torch.device) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    x, bias = make_tensor(3, 8, device=device, requires_grad=True), make_tensor(8, device=device)
    torch.compile(lambda x, b: fastattn.bias_gelu(x, b), backend=backend, fullgraph=True)(x, bias)
    assert "bias_activation" not in graphs[0] and "gelu" in graphs[0]


def test_export(device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return fastattn.bias_gelu(x, bias, implementation="triton")

    tensors = make_tensor(4, 6, device=device), make_tensor(6, device=device, seed=1)
    exported = torch.export.export(Layer(), tensors)
    assert "bias_activation_forward" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*tensors), torch_bias_gelu(*tensors))


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_leaves_the_dtype_alone(implementation: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = make_tensor(2, 8, dtype=dtype, device=device), make_tensor(8, device=device, seed=1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert fastattn.bias_gelu(x, bias, implementation=implementation).dtype == dtype


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    tensors = make_tensor(4, 6, device=device), make_tensor(6, device=device, seed=1)
    ours = partial(fastattn.bias_gelu, implementation=implementation)
    kept = partial(torch.utils.checkpoint.checkpoint, ours, use_reentrant=False)
    for plain, again in zip(results(ours, tensors), results(kept, tensors), strict=True):
        assert torch.equal(plain, again)


def test_transforms_are_pytorchs(device: torch.device) -> None:
    x, bias = make_tensor(2, 3, 6, device=device), make_tensor(6, device=device, seed=1)
    found = torch.vmap(torch.func.grad(lambda x: fastattn.bias_gelu(x, bias).square().sum()))(x)
    expected = torch.vmap(torch.func.grad(lambda x: torch_bias_gelu(x, bias).square().sum()))(x)
    torch.testing.assert_close(found, expected)


def test_bad_input_names_the_value() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\); x's last dimension needs \(3,\)"):
        fastattn.bias_gelu(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"x has 0 dimensions"):
        fastattn.bias_gelu(torch.ones(()), torch.ones(1))
    with pytest.raises(TypeError, match=r"bias has dtype=torch.int64"):
        fastattn.bias_gelu(x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"approximate='erf' must be 'none', 'tanh' or 'quick'"):
        fastattn.bias_gelu(x, torch.ones(3), "erf")
    with pytest.raises(fastattn.NotSupported, match=r"float64"):
        fastattn.bias_gelu(x, torch.ones(3).double(), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_real_sizes(dtype: torch.dtype, device: torch.device) -> None:
    x, bias = (
        make_tensor(4096, 3072, dtype=dtype, device=device),
        make_tensor(3072, dtype=dtype, device=device),
    )
    check(x, bias, "none", "triton")
