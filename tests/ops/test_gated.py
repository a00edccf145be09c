"""fastattn.geglu, swiglu and reglu, split and packed, through every implementation."""

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
    ALL_CHECKS,
    CHECKS_OF_ARGUMENTS,
    assert_as_accurate,
    assert_compiles_whole,
    assert_second_derivatives_agree,
    results,
)

FAST = ("triton", "torch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ours, the reference, and PyTorch's activation.
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "geglu": (fastattn.geglu, fastattn.reference.geglu, F.gelu),
    "geglu-tanh": (
        partial(fastattn.geglu, approximate="tanh"),
        partial(fastattn.reference.geglu, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
    ),
    "geglu-quick": (
        partial(fastattn.geglu, approximate="quick"),
        partial(fastattn.reference.geglu, approximate="quick"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    "swiglu": (fastattn.swiglu, fastattn.reference.swiglu, F.silu),
    "reglu": (fastattn.reglu, fastattn.reference.reglu, F.relu),
}


def packed(activation: Callable[[Tensor], Tensor], x: Tensor, gate_first: bool = False) -> Tensor:
    first, second = x.chunk(2, -1)
    return second * activation(first) if gate_first else first * activation(second)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_split_matches_reference(
    dtype: torch.dtype, form: str, implementation: str, device: torch.device
) -> None:
    ours, truth, activation = FORMS[form]
    value, gate = (2 * make_tensor(3, 5, 127, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    assert_as_accurate(
        results(partial(ours, implementation=implementation), (value, gate)),
        results(lambda value, gate: value * activation(gate), (value, gate)),
        results(truth, (value.double(), gate.double())),
    )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("gate_first", [False, True], ids=["value-first", "gate-first"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_matches_reference(
    form: str, gate_first: bool, implementation: str, device: torch.device
) -> None:
    ours, truth, activation = FORMS[form]
    x = make_tensor(3, 5, 2 * 63, dtype=torch.bfloat16, device=device)
    assert_as_accurate(
        results(partial(ours, gate_first=gate_first, implementation=implementation), (x,)),
        results(lambda x: packed(activation, x, gate_first), (x,)),
        results(partial(truth, gate_first=gate_first), (x.double(),)),
    )


def test_the_order_is_that_of_torchs_glu(device: torch.device) -> None:
    """Value first: swiglu is glu's value * sigmoid(gate), times the gate."""
    x = torch.tensor([[2.0, 3.0, 5.0, -6.0]], device=device)
    torch.testing.assert_close(fastattn.swiglu(x), F.glu(x, -1) * x[:, 2:])


@pytest.mark.parametrize("shape", [(), (1,), (130, 1), (1, 257)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    value, gate = (make_tensor(*shape, device=device, seed=seed) for seed in (0, 1))
    found = results(partial(fastattn.swiglu, implementation="triton"), (value, gate))
    for actual, expected in zip(found, results(lambda v, g: v * F.silu(g), (value, gate)), strict=True):
        torch.testing.assert_close(actual, expected)


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "halves": lambda x: x.chunk(2, -1),
    "transposed": lambda x: tuple(t.transpose(0, 1) for t in x.chunk(2, -1)),
    "every-other-column": lambda x: (x[..., ::2], x[..., 1::2]),
    "one-expanded": lambda x: (x[:1].expand(3, -1, -1), x),
    "columns-first": lambda x: (x.transpose(1, 2).contiguous().transpose(1, 2), x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(layout: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device) -> None:
    value, gate = layout(make_tensor(3, 4, 20, device=device))
    found = results(partial(fastattn.geglu, implementation="triton"), (value, gate))
    for actual, expected in zip(found, results(lambda v, g: v * F.gelu(g), (value, gate)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_halves_are_read_in_place(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import gated

    plans = []
    plan_of = gated.tile_plan
    monkeypatch.setattr(gated, "tile_plan", lambda *given: plans.append(plan_of(*given)) or plans[-1])
    x = make_tensor(3, 4, 20, device=device)
    fastattn.geglu(*x.chunk(2, -1), implementation="triton")
    fastattn.geglu(x, implementation="triton")
    assert [(plan.in_place, plan.distances) for plan in plans] == [((True, True), (20, 20))] * 2


def test_gaps_are_not_read(device: torch.device) -> None:
    x = make_tensor(7, 10, device=device, strides=(20, 1))
    for result in results(partial(fastattn.geglu, implementation="triton"), (x,)):
        assert result.isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str, device: torch.device) -> None:
    x = torch.empty(shape, device=device)
    y, dx = results(partial(fastattn.swiglu, implementation=implementation), (x,))
    assert y.shape == (shape[0], shape[1] // 2) and dx.shape == shape
    assert [t.shape for t in results(partial(fastattn.swiglu, implementation=implementation), (x, x))] == [
        shape
    ] * 3


@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates(form: str, device: torch.device) -> None:
    """Saturated gates give 0 or the value, and slopes without NaN; a NaN stays one; relu's slope at 0 is 0."""
    ours = partial(FORMS[form][0], implementation="triton")
    gate = torch.tensor([-1e30, -1e4, 1e4, 1e30, math.inf, 0.0, math.nan], device=device)
    value = torch.ones_like(gate)
    y, dvalue, dgate = results(ours, (value, gate))
    torch.testing.assert_close(y, torch.relu(gate), equal_nan=True)
    assert dgate[:6].isfinite().all() and dgate[:2].eq(0).all() and y[6].isnan() and dvalue[6].isnan()
    if form == "reglu":
        assert dgate[5] == 0


def test_gradients_are_made_only_where_they_are_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    backward = fastattn.ops.gated._backward

    def watched(*arguments: object) -> object:
        asked.append(arguments[4:])
        return backward(*arguments)

    monkeypatch.setattr(fastattn.ops.gated, "_backward", watched)
    for wanted in ((True, False), (False, True)):
        value, gate = (
            make_tensor(5, 8, device=device, seed=n, requires_grad=need) for n, need in enumerate(wanted)
        )
        fastattn.reglu(value, gate, implementation="triton").sum().backward()
        assert (value.grad is not None, gate.grad is not None) == wanted
    assert asked == [(True, False), (False, True)]


def test_inputs_and_gradients_are_not_written(device: torch.device) -> None:
    x, dy = make_tensor(6, 8, device=device, requires_grad=True), make_tensor(6, 4, device=device, seed=1)
    kept = x.detach().clone(), dy.clone()
    y = fastattn.geglu(x, implementation="triton")
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(x, kept[0]) and torch.equal(dy, kept[1])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("form", ["geglu", "geglu-quick", "swiglu"])
def test_double_backward(form: str, implementation: str, device: torch.device) -> None:
    ours, _, activation = FORMS[form]
    ours = partial(ours, implementation=implementation)
    tensors = make_tensor(4, 6, device=device), make_tensor(4, 6, device=device, seed=1)
    assert_second_derivatives_agree(ours, lambda v, g: v * activation(g), tensors)
    assert_second_derivatives_agree(ours, partial(packed, activation), tensors[:1])


def test_opcheck(device: torch.device) -> None:
    x, dy = make_tensor(5, 2, 8, device=device).transpose(0, 1), make_tensor(2, 5, 4, device=device)
    value, gate = x.chunk(2, -1)
    check, ops = torch.library.opcheck, torch.ops.fastattn
    check(ops.gated_forward.default, (value, gate, "silu"))
    for needs in ((True, True), (True, False), (False, True)):
        checks = ALL_CHECKS if all(needs) else CHECKS_OF_ARGUMENTS
        check(ops.gated_backward.default, (dy, value, gate, "relu", *needs), test_utils=checks)
    check(ops.gated_packed_backward.default, (dy, x, "gelu_tanh", True))


@pytest.mark.parametrize("is_packed", [False, True], ids=["split", "packed"])
def test_compiles_whole_with_dynamic_shapes(is_packed: bool, device: torch.device) -> None:
    inputs = [
        tuple(make_tensor(3, length, 8, device=device, seed=n) for n in range(1 if is_packed else 2))
        for length in (2, 5)
    ]
    theirs = partial(packed, F.silu) if is_packed else lambda v, g: v * F.silu(g)
    assert_compiles_whole(lambda *t: fastattn.swiglu(*t, implementation="triton"), theirs, inputs)
    assert "gated_" not in assert_compiles_whole(lambda *t: fastattn.swiglu(*t), theirs, inputs)


def test_one_tensor_as_value_and_gate_compiles(device: torch.device) -> None:
    x = make_tensor(3, 8, device=device)
    ours = torch.compile(
        lambda x: fastattn.swiglu(x, x, implementation="triton"), fullgraph=True, backend="aot_eager"
    )
    for actual, expected in zip(results(ours, (x,)), results(lambda x: x * F.silu(x), (x,)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_export(device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fastattn.geglu(x, implementation="triton")

    x = make_tensor(4, 6, device=device)
    exported = torch.export.export(Layer(), (x,))
    assert "gated_forward" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), packed(F.gelu, x))


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_leaves_the_dtype_alone(implementation: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = make_tensor(2, 8, dtype=dtype, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert fastattn.swiglu(x, implementation=implementation).dtype == dtype


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    x = make_tensor(4, 6, device=device)
    ours = partial(fastattn.swiglu, implementation=implementation)
    kept = partial(torch.utils.checkpoint.checkpoint, ours, use_reentrant=False)
    for plain, again in zip(results(ours, (x,)), results(kept, (x,)), strict=True):
        assert torch.equal(plain, again)


def test_transforms_are_pytorchs(device: torch.device) -> None:
    x = make_tensor(2, 3, 6, device=device)
    found = torch.vmap(torch.func.grad(lambda x: fastattn.swiglu(x).square().sum()))(x)
    torch.testing.assert_close(
        found, torch.vmap(torch.func.grad(lambda x: packed(F.silu, x).square().sum()))(x)
    )


def test_explain_names_the_function(device: torch.device) -> None:
    x = make_tensor(2, 6, device=device)
    for function in (fastattn.geglu, fastattn.swiglu, fastattn.reglu):
        found = fastattn.explain(function, x)
        assert found.operation == function.__name__ and found.implementation in ("triton", "torch")


def test_bad_input_names_the_value() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\); without a gate its last size must be even"):
        fastattn.geglu(x)
    with pytest.raises(ValueError, match=r"gate has shape \(3,\), but x has \(2, 3\)"):
        fastattn.swiglu(x, torch.ones(3))
    with pytest.raises(TypeError, match=r"gate has dtype=torch.float64, but x has torch.float32"):
        fastattn.reglu(x, x.double())
    with pytest.raises(ValueError, match=r"gate_first=True is for a packed x"):
        fastattn.reglu(x, x, gate_first=True)
    with pytest.raises(ValueError, match=r"approximate='erf' must be"):
        fastattn.geglu(x, x, "erf")
    with pytest.raises(ValueError, match=r"fastattn.swiglu has 'triton', 'torch', 'reference'"):
        fastattn.swiglu(x, x, implementation="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_real_sizes(form: str, device: torch.device) -> None:
    ours, truth, activation = FORMS[form]
    x = make_tensor(4096, 2 * 11008, dtype=torch.bfloat16, device=device)
    assert_as_accurate(
        results(partial(ours, implementation="triton"), (x,)),
        results(partial(packed, activation), (x,)),
        results(truth, (x.double(),)),
    )
