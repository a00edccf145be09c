"""Calls whose like was made before: past checks, refusals and plans, at half of the host's time or less.

That is where the Triton kernels take the call, nothing is recorded for autograd, and nothing watches operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastattn import dispatch
from fastattn.kernels._plan import planned
from fastattn.ops._register import is_direct

# For how many layouts it is known how they are launched.
_MOST_KNOWN = 4096

_UNKNOWN: Any = object()
# Once, that is: what launches the call is found the second time.
_SEEN: Any = object()

Run = Callable[..., Any]


class Again:
    """Finds what launches a call by all that decides: its tensors' layouts, and its other arguments.

    Args:
        learn: given the arguments of a call that was made once, checks them, and returns what launches tensors of such
            layouts, or None where the kernels do not take them or not so. It keeps no tensor. What it learned is
            forgotten where plans are.
    """

    def __init__(self, learn: Callable[..., Run | None]) -> None:
        self.learn = learn
        self.known: Callable[[], dict[Any, Run | None]] = planned(dict)

    def __call__(self, tensors: tuple[Any, ...], others: tuple[Any, ...], *arguments: Any) -> Run | None:
        """What launches the call; None where it has to go the usual way, for its error too.

        Args:
            tensors: those of the call, the first not None.
            others: the other arguments, with their types where equal values of two types are not the same call.
            arguments: what `learn` takes.
        """
        first = tensors[0]
        try:
            if first.requires_grad and torch.is_grad_enabled():
                return None  # as in training, where to ask further would be in vain
            if not (first.is_cuda or dispatch.INTERPRETING) or not is_direct(*tensors):
                return None
            if forward_ad._current_level >= 0 or dispatch.autocasts(first):
                return None
            layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
            key = (*layouts, others)
            known = self.known()
            run = known.get(key, _UNKNOWN)
        except (AttributeError, RuntimeError, TypeError):
            return None
        if run is not _UNKNOWN and run is not _SEEN:
            return run
        if run is _UNKNOWN:
            # Lengths that never come again, of prompts or of keys that grow, have nothing to gain from what is learned.
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[key] = _SEEN
            return None
        known[key] = run = self.learn(*arguments)
        return run
