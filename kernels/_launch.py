"""Launches of kernels, without what Triton does anew for each of them.

`kernel[grid](...)` asks of every argument its type and alignment, to find what was compiled for them: most of what a
launch costs the host, and the more the more arguments. Most of ours are fixed by a plan, which keeps what was compiled
with them; only the others are looked at, by Triton's own function. What is found is launched as Triton's tutorials
launch what they compiled ahead, `compiled[grid](...)`.

Not looked at again: Triton's switches for debugging, which are those of the first launch. Profilers' hooks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel, make_backend

from fastattn.kernels._plan import Constants


def _find_kind_of() -> Any:
    """Triton's function that says what of an argument a kernel is compiled for, or None where it is another."""
    try:
        from triton._C.libtriton import native_specialize_impl as found

        return found if found(BaseBackend, 16, False, True, True) == ("i32", "D") else None
    except (ImportError, TypeError):
        return None


_kind_of = _find_kind_of()
_backend_of = cache(make_backend)
_keeps = _kind_of is not None


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within the block, in all threads, each launch is Triton's own: for who listens to those."""
    global _keeps
    before, _keeps = _keeps, False
    try:
        yield
    finally:
        _keeps = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    constants: Constants,
    /,
    *,
    by: Sequence[Tensor | None] | None = None,
    scratch: torch.device | None = None,
    **arguments: Any,
) -> None:
    """`kernel[grid](**constants, **arguments)` on the current device, which is the constants'.

    Args:
        by: tensors whose dtypes and addresses decide, with the constants, for what the kernel is compiled, or None for
            those left out: no other argument is looked at. Without it all are.
        scratch: the device, for kernels that make descriptors themselves, in memory that an allocator gives.
        arguments: go before constants of the same name.
    """
    if scratch is not None:
        copy_context().run(_launch_with_scratch, kernel, grid, constants, by, scratch, arguments)
        return
    if constants.launched and _keeps and not kernel.pre_run_hooks:
        found = constants.launched.get(_key(kernel, grid, constants.backend, by, arguments))
        if found is not None:
            run, pick = found
            run(*pick({**constants, **arguments}))
            return
    compiled = kernel[grid](**{**constants, **arguments})
    if _keeps and isinstance(compiled, CompiledKernel):
        constants.backend = _backend_of(compiled.metadata.target)
        key = _key(kernel, grid, constants.backend, by, arguments)
        run = compiled[(*grid, 1, 1)[:3]]
        constants.launched[key] = run, itemgetter(*kernel.arg_names)


def _launch_with_scratch(
    kernel: Any,
    grid: tuple[int, ...],
    constants: Constants,
    by: Sequence[Tensor | None] | None,
    device: torch.device,
    arguments: dict[str, Any],
) -> None:
    """Triton's allocator is a context variable: it is set in a copy of the context, so that the caller's stays, and for
    every launch, because autograd's threads have contexts of their own.
    """
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device))
    launch(kernel, grid, constants, by=by, **arguments)


def _key(
    kernel: Any,
    grid: tuple[int, ...],
    backend: Any,
    by: Sequence[Tensor | None] | None,
    arguments: dict[str, Any],
) -> tuple[Any, ...]:
    """By what a launch is found again; a kernel's id is its own as long as what it compiled is kept, which holds it."""
    if by is not None:
        return (id(kernel), grid, *[_kind_of(backend, tensor, False, True, True) for tensor in by])
    values = _constexprs_of(kernel)
    kinds = [
        value if name in values else _kind_of(backend, value, False, True, True)
        for name, value in arguments.items()
    ]
    return (id(kernel), grid, *arguments, *kinds)


# By a kernel's id; it is kept with it, so that no other gets that id.
_constexprs: dict[int, tuple[Any, frozenset[str]]] = {}


def _constexprs_of(kernel: Any) -> frozenset[str]:
    found = _constexprs.get(id(kernel))
    if found is None:
        names = frozenset(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        found = _constexprs[id(kernel)] = kernel, names
    return found[1]
