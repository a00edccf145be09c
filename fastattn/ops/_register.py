"""Registers operators in torch.ops.fastattn, with their kernels found on first use.

`Library.define` and `impl` rather than `torch.library.custom_op`: half the host cost a call, and the same
support for opcheck, torch.compile, export and selective checkpointing. Autograd stays outside, in each op's
`torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastattn", "DEF")

# What each operator runs, by its name.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


def register(schema: str, launcher: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `torch.ops.fastattn.<name>` and returns its overload.

    Args:
        schema: as `Library.define` takes it, for example "gelu_forward(Tensor x, str approximate) -> Tensor".
        launcher: the module of fastattn that holds a launcher of the same name, such as "kernels.gelu". It is
            imported when the operator first runs, so that importing fastattn does not import Triton.
        fake: makes outputs of the right shape, stride and dtype without running anything.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    # One registration for every device: the launcher, being Triton, serves whatever Triton serves.
    LAUNCHERS[name] = _on_first_use(launcher, name)
    _LIBRARY.impl(name, LAUNCHERS[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastattn, name).default


def _on_first_use(module: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(f"fastattn.{module}"), name)
        return launcher(*arguments)

    return launch
