"""Checkpoints: stop a training anywhere and go on as if it had not stopped.

    save(folder, model, optimizer, step=100)
    step = load(folder, model, optimizer)
    train(model, batches(..., start=step * config.accumulation), config, optimizer=optimizer, start=step)

The weights are in `model.safetensors`, which other programs read; the rest is in `training.pt`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

_WEIGHTS = "model.safetensors"
_TRAINING = "training.pt"


def save(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Writes the weights, the optimizer, the step to go on with and PyTorch's random states into a folder.

    An interrupted save leaves each file whole, and `load` refuses a pair that does not belong together.

    Raises:
        ImportError: `safetensors` is not installed.
    """
    safetensors = _import_safetensors()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    metadata = {"step": str(step)}
    _replace(path / _WEIGHTS, lambda file: safetensors.torch.save_model(_plain(model), file, metadata))
    _replace(path / _TRAINING, lambda file: torch.save(state, file))


def load(folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads back what `save` wrote, into a model and an optimizer of the same shape.

    Returns:
        the step to go on with.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: its two files are of different steps.
        RuntimeError: the weights do not fit the model.
    """
    safetensors = _import_safetensors()
    path = Path(folder)
    for name in (_WEIGHTS, _TRAINING):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no checkpoint: {name} is missing")
    state = torch.load(path / _TRAINING, map_location="cpu", weights_only=True)
    with safetensors.safe_open(path / _WEIGHTS, framework="pt") as weights:
        weights_step = int((weights.metadata() or {}).get("step", -1))
    if weights_step != state["step"]:
        raise ValueError(
            f"{path} has the weights of step {weights_step} beside the optimizer of step {state['step']}"
        )
    safetensors.torch.load_model(_plain(model), path / _WEIGHTS)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    return state["step"]


def _plain(model: nn.Module) -> nn.Module:
    """The module itself where torch.compile wrapped it, whose names have a prefix."""
    return getattr(model, "_orig_mod", model)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Writes a file beside its place, then moves it there at once."""
    unfinished = path.with_name(path.name + ".unfinished")
    write(str(unfinished))
    os.replace(unfinished, path)


def _import_safetensors() -> Any:
    try:
        import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from error
    return import_module("safetensors")
