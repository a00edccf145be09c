"""fastattn.mlp, through every implementation and path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.memory import peak_memory
from fastattn.kernels._linear_config import LinearConfig
from fastattn.testing import make_tensor
from tests.ops.comparison import (
    ALL_CHECKS,
    CHECKS_OF_ARGUMENTS,
    assert_as_accurate,
    assert_compiles_whole,
    assert_second_derivatives_agree,
    results,
)

PATHS = ("triton-fused", "triton-separate", "torch")
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_quick", "relu", "silu")
SAVES = ("both", "pre_activation", "input")
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def torch_mlp(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, activation: str = "gelu") -> Tensor:
    return F.linear(TORCH[activation](F.linear(x, w1, b1)), w2, b2)


def make_inputs(
    rows: Sequence[int],
    width: int,
    hidden: int,
    out: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = ((*rows, width), (hidden, width), (hidden,), (out, hidden), (out,))
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
    return [
        make_tensor(*shape, dtype=dtype, device=device, seed=n) * scale
        for n, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


def check(
    tensors: Sequence[Tensor | None], implementation: str, activation: str = "gelu", **options: Any
) -> None:
    ours = partial(fastattn.mlp, activation=activation, implementation=implementation, **options)
    wide = [None if t is None else t.double() for t in tensors]
    rows = tensors[0].numel() // max(1, tensors[0].size(-1))
    assert_as_accurate(
        results(ours, tensors),
        results(partial(torch_mlp, activation=activation), tensors),
        results(partial(fastattn.reference.mlp, activation=activation), wide),
        growth=math.sqrt(max(1, rows)),
    )


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [(activation, torch.bfloat16) for activation in ACTIVATIONS]
    + [("gelu", torch.float32), ("gelu", torch.float16)],
    ids=str,
)
def test_matches_reference(
    activation: str, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    """Rows, width, hidden and out that are no multiple of a tile."""
    check(make_inputs((3, 7), 19, 41, 13, device, dtype), implementation, activation)


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("save", SAVES[1:])
def test_matches_reference_whatever_is_saved(save: str, implementation: str, device: torch.device) -> None:
    tensors = make_inputs((21,), 19, 41, 13, device, torch.bfloat16)
    check(tensors, implementation, save=save)
    both, less = (
        results(partial(fastattn.mlp, save=s, implementation=implementation), tensors) for s in ("both", save)
    )
    assert all(torch.equal(a, b) for a, b in zip(both, less, strict=True))


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (63, 1, 5), (5, 63, 1)], ids=str)
def test_odd_sizes_without_biases(
    sizes: tuple[int, int, int], implementation: str, device: torch.device
) -> None:
    x, w1, _, w2, _ = make_inputs((2,), *sizes, device)
    check((x, w1, None, w2, None), implementation)
    check((x[0], w1, None, w2, None), implementation)


@pytest.mark.parametrize("implementation", PATHS)
def test_any_strides(implementation: str, device: torch.device) -> None:
    _, w1, b1, _, b2 = make_inputs((4, 3), 6, 10, 5, device)
    tensors = (
        make_tensor(3, 4, 12, device=device).transpose(0, 1)[..., ::2],
        w1.t().contiguous().t(),
        torch.stack([b1, b1], 1)[:, 0],
        make_tensor(5, 20, device=device, seed=4)[:, ::2],
        b2,
    )
    check(tensors, implementation)


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "sizes", [((0,), 3, 4, 2), ((2, 0), 3, 4, 2), ((2,), 0, 4, 2), ((2,), 3, 0, 2)], ids=str
)
def test_empty(sizes: tuple[Any, ...], save: str, implementation: str, device: torch.device) -> None:
    rows, width, hidden, out = sizes
    tensors = [
        torch.ones(s, device=device)
        for s in ((*rows, width), (hidden, width), (hidden,), (out, hidden), (out,))
    ]
    found = results(partial(fastattn.mlp, save=save, implementation=implementation), tensors)
    for actual, expected in zip(found, results(torch_mlp, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


def _saved_elements(function: Any, parameters: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps, but for the parameters."""
    kept = []
    own = {t.data_ptr() for t in parameters if t is not None}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sorted(kept)


@pytest.mark.parametrize("implementation", PATHS)
def test_what_is_kept(implementation: str, device: torch.device) -> None:
    x, w1, b1, w2, b2 = tensors = [t.requires_grad_() for t in make_inputs((6,), 8, 10, 5, device)]
    full = [(6, 8), (6, 10), (6, 10)]
    for save, kept in (("both", full), ("pre_activation", full[:2]), ("input", full[:1])):
        call = partial(fastattn.mlp, *tensors, save=save, implementation=implementation)
        assert _saved_elements(call, tensors[1:]) == kept
    if implementation == "torch":
        return
    relu = partial(fastattn.mlp, *tensors, activation="relu", implementation=implementation)
    assert _saved_elements(relu, tensors[1:]) == full[:2]
    # Frozen parameters, as beside an adapter: x and the activation have no gradient to serve.
    for t in (w1, b1, w2, b2):
        t.requires_grad_(False)
    frozen = partial(fastattn.mlp, x, w1, b1, w2, b2, implementation=implementation)
    assert _saved_elements(frozen, (w1, b1, w2, b2)) == [(6, 10)]
    with torch.no_grad():
        assert _saved_elements(frozen, (w1, b1, w2, b2)) == []


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("wanted", range(5), ids=["x", "w1", "b1", "w2", "b2"])
def test_one_gradient_alone(wanted: int, save: str, implementation: str, device: torch.device) -> None:
    tensors = make_inputs((5,), 6, 7, 3, device)
    tensors[wanted].requires_grad_()
    y = fastattn.mlp(*tensors, save=save, implementation=implementation)
    (found,) = torch.autograd.grad(y.square().sum(), tensors[wanted])
    (expected,) = torch.autograd.grad(torch_mlp(*tensors).square().sum(), tensors[wanted])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_kept_is_freed_before_the_second_product() -> None:
    """The activation's argument lived on beside its value and the output, which only save="both" has to pay for.

    By PyTorch's operators: the interpreter holds on to what its kernels were given.
    """
    rows, hidden, out = 16, 64, 512
    tensors = [t.requires_grad_() for t in make_inputs((rows,), 4, hidden, out, torch.device("cpu"))]
    peak = peak_memory(lambda: fastattn.mlp(*tensors, save="input", implementation="torch"), "cpu")
    assert peak < 4 * rows * (out + hidden + hidden // 2)


@pytest.mark.parametrize("implementation", PATHS)
def test_inputs_and_gradients_are_not_written(implementation: str, device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in make_inputs((5,), 6, 7, 3, device)]
    dy = make_tensor(5, 3, device=device, seed=7)
    kept = [t.detach().clone() for t in (*tensors, dy)]
    y = fastattn.mlp(*tensors, implementation=implementation)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*tensors, dy), kept, strict=True))


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("save", ["both", "input"])
def test_double_backward(save: str, implementation: str, device: torch.device) -> None:
    tensors = make_inputs((4,), 5, 6, 3, device)
    assert_second_derivatives_agree(
        partial(fastattn.mlp, save=save, implementation=implementation), torch_mlp, tensors
    )


def test_a_second_derivative_that_needs_an_x_not_kept_is_refused(device: torch.device) -> None:
    x, *parameters = make_inputs((4,), 5, 6, 3, device)
    x.requires_grad_()
    y = fastattn.mlp(x, *parameters, implementation="triton-separate")
    with pytest.raises(fastattn.NotSupported, match=r"keeps no x where fc1_weight needs no gradient"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = fastattn.mlp(x, *parameters, save="input", implementation="triton-separate")
    (found,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(torch_mlp(x, *parameters).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_opcheck(device: torch.device) -> None:
    x, w1, b1, w2, _ = make_inputs((5,), 6, 7, 3, device)
    pre, dy = F.linear(x, w1, b1), make_tensor(5, 3, device=device)
    check, ops = torch.library.opcheck, torch.ops.fastattn
    for needs, checks in (((True, True), ALL_CHECKS), ((False, True), CHECKS_OF_ARGUMENTS)):
        check(ops.linear_activation_forward.default, (x, w1, b1, "gelu", *needs), test_utils=checks)
    for needs, checks in (((torch.float32, True), ALL_CHECKS), ((None, False), CHECKS_OF_ARGUMENTS)):
        check(ops.linear_activation_backward.default, (dy, w2, pre, "silu", *needs), test_utils=checks)


@pytest.mark.parametrize(
    ("implementation", "save", "operator"),
    [
        ("triton-fused", "both", "linear_activation_forward"),
        ("triton-separate", "pre_activation", "bias_activation_forward"),
        (None, "input", "bias_activation_forward"),
    ],
)
def test_compiles_whole_with_dynamic_shapes(
    implementation: str | None, save: str, operator: str, device: torch.device
) -> None:
    """In float32 the automatic path is the separate one on every device."""
    inputs = [make_inputs((3, length), 6, 8, 5, device) for length in (2, 5)]
    ours = partial(fastattn.mlp, save=save, implementation=implementation)
    assert operator in assert_compiles_whole(lambda *t: ours(*t), torch_mlp, inputs)


def test_the_compiler_takes_over_the_separate_path(device: torch.device) -> None:
    inputs = [make_inputs((3, length), 6, 8, 5, device) for length in (2, 5)]
    graph = assert_compiles_whole(lambda *t: fastattn.mlp(*t), torch_mlp, inputs)
    assert "ops.fastattn" not in graph and "linear" in graph


def test_export(device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return fastattn.mlp(*tensors, implementation="triton-fused")

    tensors = tuple(make_inputs((4,), 5, 6, 3, device))
    exported = torch.export.export(Layer(), tensors)
    assert "linear_activation_forward" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*tensors), torch_mlp(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PATHS)
def test_autocast_is_that_of_linear_layers(implementation: str, device: torch.device) -> None:
    """float32 parameters beside an x of either dtype: y in the autocast dtype, gradients in the tensors' own.

    The backward may run inside the block too.
    """
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters = make_inputs((5,), 6, 7, 3, device)
        tensors = [t.requires_grad_() for t in (x.to(dtype), *parameters)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = fastattn.mlp(*tensors, save="input", implementation=implementation)
            expected = torch_mlp(*tensors)
            found = torch.autograd.grad(y.float().square().sum(), tensors)
        peers = torch.autograd.grad(expected.float().square().sum(), tensors)
        assert y.dtype == expected.dtype == torch.bfloat16
        for gradient, peer, tensor in zip(found, peers, tensors, strict=True):
            assert gradient.dtype == tensor.dtype
            torch.testing.assert_close(gradient, peer, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("implementation", PATHS)
def test_autocast_around_the_backward_alone_changes_nothing(
    implementation: str, device: torch.device
) -> None:
    tensors = [t.requires_grad_() for t in make_inputs((5,), 6, 7, 3, device)]
    y = fastattn.mlp(*tensors, save="input", implementation=implementation)
    plain = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("implementation", PATHS)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    tensors = make_inputs((5,), 6, 7, 3, device)
    ours = partial(fastattn.mlp, implementation=implementation)
    kept = partial(torch.utils.checkpoint.checkpoint, ours, use_reentrant=False)
    for plain, again in zip(results(ours, tensors), results(kept, tensors), strict=True):
        assert torch.equal(plain, again)


def test_transforms_are_pytorchs(device: torch.device) -> None:
    x, *parameters = make_inputs((2, 4), 5, 6, 3, device)
    found = torch.vmap(torch.func.grad(lambda x: fastattn.mlp(x, *parameters).square().sum()))(x)
    expected = torch.vmap(torch.func.grad(lambda x: torch_mlp(x, *parameters).square().sum()))(x)
    torch.testing.assert_close(found, expected)


def test_a_changed_weight_is_noticed_in_the_backward(device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in make_inputs((5,), 6, 7, 3, device)]
    y = fastattn.mlp(*tensors, implementation="triton-separate")
    with torch.no_grad():
        tensors[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_explain_names_path_and_reason(device: torch.device) -> None:
    tensors = make_inputs((5,), 6, 7, 3, device)
    found = fastattn.explain(fastattn.mlp, *tensors)
    assert found.implementation == "triton"
    assert "path 'separate': dtype=torch.float32 has no tensor cores" in found.description
    assert "the fused path" in str(fastattn.explain(fastattn.mlp, *tensors, implementation="triton-fused"))


def test_the_torch_implementation_of_both_is_pytorchs_own(device: torch.device) -> None:
    """Nothing of ours stands between PyTorch and a CPU."""
    tensors = [t.requires_grad_() for t in make_inputs((5,), 6, 7, 3, device)]
    y = fastattn.mlp(*tensors, implementation="torch")
    assert "Mlp" not in type(y.grad_fn).__name__
    assert "Mlp" in type(fastattn.mlp(*tensors, save="input", implementation="torch").grad_fn).__name__


def test_many_rows_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several row tiles in several groups, with other sides than the interpreter's own."""
    from fastattn.kernels import linear_activation

    monkeypatch.setattr(
        linear_activation,
        "select_linear_config",
        lambda dtype, target: LinearConfig(32, 64, 32, 2, num_warps=4, num_stages=2, pieces=4),
    )
    check(make_inputs((150,), 40, 130, 33, device), "triton-fused")


def test_bad_input_names_the_value() -> None:
    x, w1, b1, w2, b2 = tensors = make_inputs((5,), 6, 7, 3, torch.device("cpu"))
    for changed, message in (
        ((x[:, :5], *tensors[1:]), r"fc1_weight has shape \(7, 6\); x's width=5 must be its second size"),
        ((x, w1, b1, w2[:, :2], b2), r"fc2_weight has shape \(3, 2\); hidden=7 must be its second size"),
        ((x, w1, b2, w2, b2), r"fc1_bias has shape \(3,\); \(7,\) is needed"),
        ((x, w1, b1, w2, b1), r"fc2_bias has shape \(7,\); \(3,\) is needed"),
        ((x, b1, b1, w2, b2), r"have 2, 1 and 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.mlp(*changed)
    with pytest.raises(TypeError, match=r"fc2_bias has dtype=torch.float64, but x has torch.float32"):
        fastattn.mlp(x, w1, b1, w2, b2.double())
    with pytest.raises(ValueError, match=r"activation='tanh' must be one of 'gelu', 'gelu_tanh'"):
        fastattn.mlp(*tensors, activation="tanh")
    with pytest.raises(ValueError, match=r"save='all' must be one of 'both', 'pre_activation', 'input'"):
        fastattn.mlp(*tensors, save="all")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", PATHS[:2])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("sizes", [(4096, 768, 3072, 768), (1000, 1000, 4104, 999)], ids=str)
def test_real_sizes(sizes: tuple[int, ...], save: str, implementation: str, device: torch.device) -> None:
    rows, *widths = sizes
    check(make_inputs((rows,), *widths, device, torch.bfloat16), implementation, save=save)
