"""Where providers are registered, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Provider = Callable[[Any, torch.device], Function]

# operation -> name -> provider, in the order of the tables
PROVIDERS: dict[str, dict[str, Provider]] = {
    operation: {}
    for operation in (
        "attention",
        "layer_norm",
        "rms_norm",
        "add_layer_norm",
        "add_rms_norm",
        "gelu",
        "bias_gelu",
        "geglu",
        "swiglu",
        "mlp",
        "loss",
        "linear_loss",
        "block",
        "rotary",
        "attention_e4m3",
    )
}
BASELINES = ("naive", "torch")
# (operation, provider, direction) -> what a reader of its time must know
NOTES: dict[tuple[str, str, str], str] = {}


class Absent(Exception):
    """A provider cannot run here; the message says why."""


def provider(operation: str, name: str) -> Callable[[Provider], Provider]:
    """Decorator: registers a provider of an operation under a name.

    Raises:
        ValueError: the operation is unknown, or the name is taken.
    """
    if operation not in PROVIDERS:
        raise ValueError(f"operation={operation!r} is unknown; there are {', '.join(PROVIDERS)}")
    if name in PROVIDERS[operation]:
        raise ValueError(f"operation {operation!r} has a provider {name!r} already")

    def register(function: Provider) -> Provider:
        PROVIDERS[operation][name] = function
        return function

    return register


def compiled(function: Function, device: torch.device) -> Function:
    """torch.compile of a function, for the shapes of one case alone."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def refuse_interpreter(device: torch.device) -> None:
    if device.type == "cpu" and dispatch.INTERPRETING:
        raise Absent("TRITON_INTERPRET is set: Triton's interpreter is for tests, its time says nothing")


def import_peer(module: str, device: torch.device) -> Any:
    """Another package's module; the peers serve GPUs alone."""
    found = import_module(module)  # an ImportError is an absence too
    if device.type != "cuda":
        raise Absent(f"{module} needs a GPU; the device is {device.type}")
    return found
