"""Operators that are called past PyTorch's dispatcher where nobody could tell, and through it where somebody could."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops import _register
from fastattn.testing import make_tensor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that go through the dispatcher."""
    names: list[str] = []
    call = torch._ops.OpOverload.__call__

    def counted(self: Any, /, *arguments: Any, **keywords: Any) -> Any:
        if self.namespace == "fastattn":
            names.append(self._schema.name)
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    return names


def norm(x: Tensor, **options: Any) -> Tensor:
    return fastattn.layer_norm(x, 8, implementation="triton", **options)


def test_a_call_that_nobody_watches_goes_past_the_dispatcher(seen: list[str], device: torch.device) -> None:
    x = make_tensor(3, 8, device=device, requires_grad=True)
    norm(x).sum().backward()
    with torch.no_grad():
        norm(x)
    norm(x.detach())
    assert seen == []


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def _in_mode(x: Tensor) -> None:
    with Watching():
        norm(x)


def _in_function_mode(x: Tensor) -> None:
    with torch.device(x.device):
        norm(x)


def _of_a_subclass(x: Tensor) -> None:
    norm(x.as_subclass(Subclass))


def _with_an_int_for_a_float(x: Tensor) -> None:
    norm(x, eps=1)


def _traced(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and what it makes of shapes
        traced = torch.jit.trace(norm, (x,), check_trace=False)
    assert "fastattn::norm_forward" in str(traced.graph)


def _made_to_a_graph(x: Tensor) -> None:
    graph = make_fx(norm)(x).graph
    assert torch.ops.fastattn.norm_forward.default in [node.target for node in graph.nodes]


def _made_to_a_graph_before_dispatch(x: Tensor) -> None:
    graph = make_fx(norm, pre_dispatch=True)(x).graph
    assert torch.ops.fastattn.norm_forward.default in [node.target for node in graph.nodes]


def _fake(x: Tensor) -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert type(norm(fake)) is FakeTensor


def _in_a_thread_with_a_mode(x: Tensor) -> None:
    """Modes are the thread's own."""
    thread = threading.Thread(target=_in_mode, args=(x,))
    with Watching():
        norm(x)
        thread.start()
        thread.join()


def _profiled(x: Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    assert "fastattn::norm_forward" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "call",
    [
        _in_mode,
        _in_function_mode,
        _in_a_thread_with_a_mode,
        _of_a_subclass,
        _fake,
        _with_an_int_for_a_float,
        _traced,
        _made_to_a_graph,
        _made_to_a_graph_before_dispatch,
        _profiled,
    ],
    ids=lambda call: call.__name__.strip("_"),
)
def test_a_call_that_is_watched_goes_through_the_dispatcher(
    call: Callable[[Tensor], None], seen: list[str], device: torch.device
) -> None:
    call(make_tensor(3, 8, device=device))
    assert set(seen) == {"fastattn::norm_forward"}  # a mode calls it again


def test_what_autograd_would_record_goes_through_the_dispatcher(device: torch.device) -> None:
    """A backward under create_graph: what a launcher does by PyTorch's operators must not become part of a graph."""
    x = make_tensor(3, requires_grad=True, device=device)
    places = _places("Tensor", "Optional[float]", "List[Tensor]")
    assert _register._are_plain((x, None, [x]), places, records=False)
    assert not _register._are_plain((x, None), places, records=True)
    assert not _register._are_plain((x.detach(), None, [x]), places, records=True)
    assert _register._are_plain((x.detach(), 1.0, [x.detach()]), places, records=True)


def test_arguments_are_those_that_the_operator_would_hand_on(device: torch.device) -> None:
    """A bool is an int, and where a float is declared the kernel was compiled for it: a NumPy error, or a slow call."""
    x = make_tensor(3, device=device)
    plain = {"Tensor": x, "int": 3, "float": 0.5, "bool": True, "str": "gelu", "ScalarType": torch.float32}
    plain |= {f"Optional[{name}]": value for name, value in plain.items()} | {"List[bool]": [True]}
    for declared, value in plain.items():
        places = _places(declared)
        assert _register._are_plain((value,), places, records=True), declared
        assert _register._are_plain((None,), places, records=True) == declared.startswith("Optional")
        assert _register._are_plain((), places, records=True)  # a trailing default
    wrong = {"float": 1, "int": True, "Optional[float]": True, "SymInt": 1.0, "Tensor": 1.0, "List[bool]": x}
    for declared, value in (wrong | {"Optional[int]": x, "List[Tensor]": [1.0]}).items():
        assert not _register._are_plain((value,), _places(declared), records=True), declared


def _places(*declared: str) -> _register._Places:
    return _register._Places([_register._types_of(one) for one in declared])


def _negative(x: Tensor) -> Tensor:
    """In memory its negative."""
    return torch._neg_view(-x)


def _zeros(x: Tensor) -> Tensor:
    """Without memory."""
    return torch._efficientzerotensor(x.shape, device=x.device)


@pytest.mark.parametrize("unusual", [_negative, _zeros], ids=lambda make: make.__name__.strip("_"))
def test_tensors_that_the_dispatcher_makes_ordinary_first(
    unusual: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Past the dispatcher the kernels read the negative's memory, and for zeros no memory at all."""
    x = make_tensor(3, 8, device=device)
    given = unusual(x)
    assert torch.equal(norm(given), norm(given.clone()))
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    found = torch.autograd.grad(y, leaf, given, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad(y, leaf, given.clone())[0])


def test_the_imaginary_part_of_a_conjugate_as_a_bias(device: torch.device) -> None:
    """Its memory holds the negative, and a bias is read in place with any strides."""
    q = make_tensor(1, 2, 5, 16, device=device)
    bias = (
        torch.complex(make_tensor(5, 5, device=device), make_tensor(5, 5, seed=1, device=device)).conj().imag
    )
    assert bias.is_neg()
    found = fastattn.attention(q, q, q, bias=bias, implementation="triton")
    assert torch.equal(found, fastattn.attention(q, q, q, bias=bias.clone(), implementation="triton"))


def test_gradients_of_a_batch_of_gradients(device: torch.device) -> None:
    """`is_grads_batched` makes one tensor of a batch, which is no transform that is active, and has no memory."""
    leaf = make_tensor(3, 8, device=device, requires_grad=True)
    y = norm(leaf)
    gradients = make_tensor(2, 3, 8, seed=1, device=device)
    found = torch.autograd.grad(y, leaf, gradients, retain_graph=True, is_grads_batched=True)[0]
    for one, gradient in zip(found, gradients, strict=True):
        assert torch.equal(one, torch.autograd.grad(y, leaf, gradient, retain_graph=True)[0])


def test_meta_tensors_have_shapes_alone(seen: list[str]) -> None:
    """The operator's fake function makes them, where blocks of PyTorch's operators would read lengths and seeds."""
    q = torch.empty(1, 2, 40, 16, device="meta")
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    assert fastattn.attention(q, q, q, key_lengths=lengths, dropout_p=0.5).shape == q.shape
    assert seen


def test_tensors_of_inference_mode_are_ordinary(seen: list[str], device: torch.device) -> None:
    with torch.inference_mode():
        x = make_tensor(3, 8, device=device)
        assert norm(x).is_inference()
    assert not norm(x).is_inference()
    assert seen == []
