"""Operators that are called past PyTorch's dispatcher where nobody could tell, and through it where somebody could."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
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


def _profiled(x: Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    assert "fastattn::norm_forward" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "call",
    [_in_mode, _in_function_mode, _of_a_subclass, _with_an_int_for_a_float, _profiled],
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
    assert _register._are_plain((x, None, 1.0, [x]), records=False)
    assert not _register._are_plain((x, None), records=True)
    assert not _register._are_plain((None, [x]), records=True)
    assert _register._are_plain((x.detach(), "gelu", torch.float32), records=True)
