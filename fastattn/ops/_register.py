"""Registers operators in torch.ops.fastattn, with their kernels found on first use.

`Library.define` and `impl` rather than `torch.library.custom_op`: half the host cost a call, and the same
support for opcheck, torch.compile, export and selective checkpointing. Autograd stays outside, in each op's
`torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("fastattn", "DEF")

# What each operator runs, by its name; each takes the place of what imports it when it first runs.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


def register(schema: str, launcher: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `torch.ops.fastattn.<name>` and returns a function that calls it, or its launcher at once.

    Args:
        schema: as `Library.define` takes it, for example "gelu_forward(Tensor x, str approximate) -> Tensor".
        launcher: the module of fastattn that holds a launcher of the same name, such as "kernels.gelu". It is
            imported when the operator first runs, so that importing fastattn does not import Triton.
        fake: makes outputs of the right shape, stride and dtype without running anything.
    """
    name = schema.partition("(")[0]
    LAUNCHERS[name] = _on_first_use(launcher, name)
    _LIBRARY.define(schema)
    # One registration for every device: the launcher, being Triton, serves whatever Triton serves.
    _LIBRARY.impl(name, lambda *arguments: LAUNCHERS[name](*arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fastattn, name).default
    places = _Places([_types_of(str(argument.real_type)) for argument in operator._schema.arguments])

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched():
            return operator(*arguments)
        if not _are_plain(arguments, places, torch.is_grad_enabled()):
            return operator(*arguments)
        return LAUNCHERS[name](*arguments)

    return call


def is_direct(*tensors: Any) -> bool:
    """Whether a call on these, plain tensors or None, could go to a launcher at once, as an operator's does."""
    if torch.compiler.is_compiling() or _is_watched():
        return False
    return _are_plain(tensors, _OF_TENSORS, torch.is_grad_enabled())


def _is_watched() -> bool:
    """Whether anything but the launcher would learn of an operator's call: a mode, a transform, a tracer, a profiler.

    Where nothing does, PyTorch's dispatcher can only hand the call on, at a quarter of the host cost of a small call.
    Two watchers cannot be asked for and learn nothing: an `ExecutionTraceObserver` without a profiler, and kernels that
    somebody else registers for these operators.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


_TENSORS = frozenset((Tensor, Parameter))
_LISTS = frozenset((list, tuple))
_VALUES = {
    "int": int, "SymInt": int, "float": float, "bool": bool, "str": str, "ScalarType": torch.dtype
}  # fmt: skip


def _types_of(declared: str) -> frozenset[type]:
    """The types of an argument that the dispatcher hands on unchanged: it makes a float of an int."""
    name = declared.removeprefix("Optional[").removesuffix("]")
    types = _TENSORS if name == "Tensor" else _LISTS if name.startswith("List[") else {_VALUES[name]}
    return frozenset(types | {type(None)} if declared.startswith("Optional[") else types)


class _Places(dict[tuple[type, ...], "tuple[int, ...]"]):
    """Of the types of a call's arguments, all of them among those given: which are tensors and lists.

    Kept, so that the other arguments of a call, the most, cost it one look-up. A KeyError where another type is.
    """

    def __init__(self, types: Iterable[frozenset[type]]) -> None:
        super().__init__()
        self.types = types

    def __missing__(self, kinds: tuple[type, ...]) -> tuple[int, ...]:
        for kind, known in zip(kinds, self.types, strict=False):  # trailing defaults may be left out
            if kind not in known:
                raise KeyError(kind)
        found = tuple(place for place, kind in enumerate(kinds) if kind in _TENSORS or kind in _LISTS)
        self[kinds] = found
        return found


_OF_TENSORS = _Places(repeat(frozenset((type(None), *_TENSORS))))
_OF_LISTS = _Places(repeat(frozenset((type(None), bool, *_TENSORS))))


def _are_plain(arguments: Sequence[Any], places: _Places, records: bool) -> bool:
    """Whether no argument has its own say in an operator's call, or is changed on the way to its launcher.

    Subclasses of Tensor have, and where autograd `records`, tensors that require a gradient: below an operator nothing
    is recorded. Tensors whose memory does not hold their values are made ordinary by the dispatcher, or have another
    kernel: the negative of what is there (as `.conj().imag` is), zeros without memory, a batch of `is_grads_batched`,
    meta tensors.
    """
    try:
        for place in places[tuple(map(type, arguments))]:
            argument = arguments[place]
            if type(argument) in _LISTS:
                if not _are_plain(argument, _OF_LISTS, records):
                    return False
                continue
            if (records and argument.requires_grad) or argument.is_neg():
                return False
            if argument.data_ptr() == 0 and (argument.is_meta or argument.numel() > 0):
                return False
    except (KeyError, RuntimeError):  # another type, or a tensor without memory to ask for
        return False
    return True


def _on_first_use(module: str, name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        LAUNCHERS[name] = getattr(import_module(f"fastattn.{module}"), name)
        return LAUNCHERS[name](*arguments)

    return launch
