"""Registers operators in torch.ops.fastattn, with their kernels found on first use.

`Library.define` and `impl` rather than `torch.library.custom_op`: half the host cost a call, and the same
support for opcheck, torch.compile, export and selective checkpointing. Autograd stays outside, in each op's
`torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("fastattn", "DEF")

# What each operator runs, by its name.
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
    launch = _on_first_use(launcher, name)
    _LIBRARY.define(schema)
    # One registration for every device: the launcher, being Triton, serves whatever Triton serves.
    LAUNCHERS[name] = launch
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fastattn, name).default
    types = [str(argument.type) for argument in operator._schema.arguments]
    floats = [place for place, kind in enumerate(types) if kind in ("float", "Optional[float]")]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched():
            return operator(*arguments)
        if not _are_plain(arguments, torch.is_grad_enabled()):
            return operator(*arguments)
        for place in floats:
            if type(arguments[place]) is int:  # the operator makes it a float, as the kernels need it
                return operator(*arguments)
        return launch(*arguments)

    return call


def _is_watched() -> bool:
    """Whether anything but the launcher would learn of an operator's call: a mode, a transform, a tracer, a profiler.

    Where nothing does, PyTorch's dispatcher can only hand the call on, at a quarter of the host cost of a small call.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


_TENSORS = (Tensor, Parameter)
_VALUES = frozenset((type(None), bool, int, float, str, torch.dtype))


def _are_plain(arguments: Sequence[Any], records: bool) -> bool:
    """Whether no argument has its own say in an operator's call.

    Subclasses of Tensor have, and where autograd `records`, tensors that require a gradient: below an operator nothing
    is recorded.
    """
    for argument in arguments:
        kind = type(argument)
        if kind in _VALUES:
            continue
        if kind in _TENSORS:
            if records and argument.requires_grad:
                return False
        elif kind not in (list, tuple) or not _are_plain(argument, records):
            return False
    return True


def _on_first_use(module: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(f"fastattn.{module}"), name)
        return launcher(*arguments)

    return launch
