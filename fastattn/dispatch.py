"""Which implementation a call takes, and why not the others.

An operation has an ordered tuple of implementations. Each one either takes a call or refuses it with a
reason. Nothing falls through silently: `explain` shows the decision and every refusal, `implementation=` and
`use_implementation` force one implementation or raise `NotSupported` with its reason.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_are_active
from torch._C import _is_any_autocast_enabled
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton's own switch. Triton reads it when a kernel is defined, so it cannot change later in a process.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
    "y",
)

# Triton's interpreter keeps bfloat16 as 16-bit integers and multiplies those. Test support that mends it says so
# here; until then a bfloat16 product is refused rather than wrong.
interpreter_multiplies_bfloat16 = False

# Nor does it round to e4m3, or know its NaN.
interpreter_rounds_e4m3 = False

# The oldest NVIDIA architecture Triton compiles for, and the oldest with bfloat16.
MIN_CAPABILITY = (7, 5)
MIN_CAPABILITY_BFLOAT16 = (8, 0)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NotSupported(NotImplementedError):
    """An implementation cannot take this call; the message names the value and the bound."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    `refuse(*arguments)` returns the reason why this implementation cannot take the call, or None.
    `step_aside(*arguments)` returns the reason why it should not be the automatic choice although it could
    take the call, or None. `describe(*arguments)` says in words what runs, and `forms(*arguments)`, where given,
    why not in another of its forms. All of these take the operation's arguments: the public function's in their
    order, without `implementation`, or what `pack` makes of them.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    describe: Callable[..., str]
    step_aside: Callable[..., str | None] | None = None
    only_by_name: bool = False
    forms: Callable[..., dict[str, str]] | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the implementation chosen and each refusal, in the order they were asked.

    `forms` says of each other form of that implementation why it is not taken, where it has several; it is not printed.
    """

    operation: str
    implementation: str
    description: str
    refusals: dict[str, str]
    forms: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fastattn.{self.operation} takes {self.implementation!r}: {self.description}"]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()


class Operation:
    """A public function's argument check and its ordered implementations.

    `check(*arguments)` raises on bad input. `cast(*arguments)`, where given, returns the arguments as autocast
    would hand them on; it runs after the check, where autocast is on for the device of the first argument.
    `at_once(*arguments)`, where given, returns what the automatic choice returns for a call that needs no check, or
    None: the questions asked of a small tensor cost more than what is computed. It is asked where nothing is forced.
    `pack(*arguments)`, where given, makes the operation's arguments of the public function's; the function itself
    calls it, and `explain` does.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        implementations: tuple[Implementation, ...],
        cast: Callable[..., tuple[Any, ...]] | None = None,
        pack: Callable[..., tuple[Any, ...]] | None = None,
        at_once: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.pack = pack
        self.at_once = at_once
        self.check = check
        self.cast = cast
        self.implementations = implementations
        self.automatic = tuple(i for i in implementations if not i.only_by_name)

    def public(self, function: _F) -> _F:
        """Decorator: makes `explain` know the public function; returns it unchanged."""
        _operations[function] = (self, inspect.signature(function))
        return function

    def __call__(self, requested: str | None, *arguments: Any) -> Any:
        if requested is None:
            requested = _forced.name
        if self.at_once is not None and requested is None:
            found = self.at_once(*arguments)
            if found is not None:
                return found
        self.check(*arguments)
        if self.cast is not None and autocasts(arguments[0]):
            arguments = self.cast(*arguments)
        if requested is not None:
            return self._named(requested, *arguments).run(*arguments)
        for implementation in self.automatic:
            aside = implementation.step_aside
            if implementation.refuse(*arguments) is None and (aside is None or aside(*arguments) is None):
                return implementation.run(*arguments)
        raise NotSupported(self._no_implementation(*arguments))

    def explain(self, requested: str | None, *arguments: Any) -> Explanation:
        # As in __call__, which has no function for it because a call costs half a microsecond.
        self.check(*arguments)
        if self.cast is not None and autocasts(arguments[0]):
            arguments = self.cast(*arguments)
        if requested is None:
            requested = _forced.name
        if requested is not None:
            chosen = self._named(requested, *arguments)
            others = {i.name: f"{requested!r} was asked for by name" for i in self.implementations}
            del others[chosen.name]
            return self._explanation(chosen, others, *arguments)
        refusals: dict[str, str] = {}
        choice: Implementation | None = None
        for implementation in self.implementations:
            reason = self._automatic_refusal(implementation, choice, *arguments)
            if reason is None:
                choice = implementation
            else:
                refusals[implementation.name] = reason
        if choice is None:
            raise NotSupported(self._no_implementation(*arguments))
        return self._explanation(choice, refusals, *arguments)

    def _explanation(self, chosen: Implementation, refusals: dict[str, str], *arguments: Any) -> Explanation:
        forms = {} if chosen.forms is None else chosen.forms(*arguments)
        return Explanation(self.name, chosen.name, chosen.describe(*arguments), refusals, forms)

    def _automatic_refusal(
        self, implementation: Implementation, choice: Implementation | None, *arguments: Any
    ) -> str | None:
        if implementation.only_by_name:
            return "runs only when asked for by name"
        reason = implementation.refuse(*arguments)
        if reason is None and implementation.step_aside is not None:
            reason = implementation.step_aside(*arguments)
        if reason is None and choice is not None:
            return f"{choice.name!r} comes first"
        return reason

    def _named(self, name: str, *arguments: Any) -> Implementation:
        for implementation in self.implementations:
            if implementation.name == name:
                reason = implementation.refuse(*arguments)
                if reason is not None:
                    raise NotSupported(f"fastattn.{self.name}, implementation={name!r}: {reason}")
                return implementation
        known = ", ".join(repr(i.name) for i in self.implementations)
        raise ValueError(f"implementation={name!r} is unknown; fastattn.{self.name} has {known}")

    def _no_implementation(self, *arguments: Any) -> str:
        reasons = "; ".join(f"{i.name}: {i.refuse(*arguments)}" for i in self.automatic)
        return f"no implementation of fastattn.{self.name} takes this call ({reasons})"


_operations: dict[Callable[..., Any], tuple[Operation, inspect.Signature]] = {}

IMPLEMENTATION_NAMES = ("triton", "torch", "reference")


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Forces one implementation of every operation within the block, in this thread.

    Args:
        name: "triton", "torch" or "reference".

    Raises:
        ValueError: the name is none of these.
        NotSupported: from the calls inside, where that implementation cannot take them.

    A call's own `implementation=` argument goes before the block's. The block is for the forward: the backward is that
    of the implementation that ran. `torch.utils.checkpoint` runs the forward again during the backward, outside the
    block or in another thread; give `implementation=` to what is checkpointed.
    """
    if name not in IMPLEMENTATION_NAMES:
        known = ", ".join(map(repr, IMPLEMENTATION_NAMES))
        raise ValueError(f"implementation={name!r} is unknown; there are {known}")
    previous = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def explain(operation: Callable[..., Any] | Tensor, /, *arguments: Any, **keywords: Any) -> Explanation:
    """Says which implementation a call takes, and why not the others, without running it.

    Args:
        operation: a public function, as in `explain(fastattn.gelu, x, approximate="tanh")`. A tensor stands
            for `fastattn.attention` with that query, as in `explain(q, k, v, causal="top_left")`.
        arguments, keywords: the call's arguments.

    Returns:
        An `Explanation` with `implementation`, `description`, `refusals` and `forms`; print it.

    Raises:
        Whatever the call itself would raise for its arguments.
    """
    if isinstance(operation, Tensor):
        arguments = (operation, *arguments)
        operation = _default_operation()
    if operation not in _operations:
        known = ", ".join(f"fastattn.{known_operation.name}" for known_operation, _ in _operations.values())
        raise ValueError(f"explain() knows {known}; not {operation!r}")
    found, signature = _operations[operation]
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    requested = bound.arguments.pop("implementation", None)
    given = tuple(bound.arguments.values())
    return found.explain(requested, *(given if found.pack is None else found.pack(*given)))


def _default_operation() -> Callable[..., Any]:
    return next(function for function, (found, _) in _operations.items() if found.name == "attention")


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; meta tensors, for one, have none."""
    # Asked first, because without it the answer costs a microsecond of host time in every call.
    if not torch.compiler.is_compiling() and not _is_any_autocast_enabled():
        return False
    kind = tensor.device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(
        kind
    )


def linear_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in on this input: autocast's, but float64 stays."""
    if tensor.dtype != torch.float64 and autocasts(tensor):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


class _DebugChecks(threading.local):
    on = False


_debug_checks = _DebugChecks()


@contextmanager
def debug_checks() -> Iterator[None]:
    """Within the block, in this thread, values that lie on a GPU (lengths, offsets) are checked too.

    Reading them waits for the device, so that without this only values on the CPU are checked; the kernels stay within
    the tensors whatever the values are.
    """
    previous = _debug_checks.on
    _debug_checks.on = True
    try:
        yield
    finally:
        _debug_checks.on = previous


def checking(tensor: Tensor) -> bool:
    """Whether the values of a tensor of lengths or offsets are to be checked."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    if _transforms_are_active():
        return False  # what vmap maps over has no values to read
    return tensor.device.type == "cpu" or _debug_checks.on


def refuse_triton(tensor: Tensor, dtype: torch.dtype, least: tuple[int, int] = MIN_CAPABILITY) -> str | None:
    """Why Triton kernels cannot run on this tensor in this dtype, or None.

    `least` is the compute capability that the kernels need on an NVIDIA GPU.
    """
    on_gpu = tensor.is_cuda
    if not on_gpu and not (INTERPRETING and tensor.device.type == "cpu"):
        if not HAS_TRITON:
            return "Triton is not installed"
        return "the tensors are not on a GPU (Triton's interpreter, TRITON_INTERPRET=1, is off)"
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return refuse_dtype(dtype)
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"layout={tensor.layout} is not torch.strided, or the tensor is nested"
    if on_gpu and torch.version.hip is None:
        capability = _capability(tensor.device.index)
        least = max(least, MIN_CAPABILITY_BFLOAT16) if dtype == torch.bfloat16 else least
        if capability < least:
            return f"compute capability {capability} is below {least} for {dtype}"
    return refuse_transforms()


def refuse_transforms() -> str | None:
    """Why what is no PyTorch operator cannot run here, or None.

    A `torch.autograd.Function` of the plain kind is invisible to transforms: its derivative would be dropped, and
    nobody told.
    """
    if torch.compiler.is_compiling():
        return None
    if _transforms_are_active():
        where = "torch.func transforms (vmap, grad, jvp, ...)"
    elif forward_ad._current_level >= 0:
        where = "forward-mode AD"
    else:
        return None
    instead = "implementation='reference' consists of them"
    return f"within {where} only PyTorch's own operators are differentiated; {instead}"


_capabilities: dict[int, tuple[int, int]] = {}


def _capability(index: int) -> tuple[int, int]:
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


# What torch.compiler.assume_constant_result sets; that function would import the compiler.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_dtype(dtype: torch.dtype) -> str:
    """The refusal of a dtype that no Triton kernel takes."""
    return f"dtype={dtype} is not one of float16, bfloat16, float32"
