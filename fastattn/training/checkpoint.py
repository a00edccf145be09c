"""Checkpoints: stop a training anywhere and go on as if it had not stopped.

    save(folder, model, optimizer, step=100)
    step = load(folder, model, optimizer)
    train(model, batches(..., start=step * config.accumulation), config, optimizer=optimizer, start=step)

The weights are in `model.safetensors`, which other programs read; the rest is in `training-<id>.pt`, where the
id is a random one that the weights name.
"""

from __future__ import annotations

import os
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

_WEIGHTS = "model.safetensors"


def save(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Writes the weights, the optimizer, the step to go on with and PyTorch's random states into a folder.

    The folder's last checkpoint stays whole until the new one is on the disk: wherever a save is interrupted,
    `load` finds one or the other. The old one is then removed; other files in the folder are left alone.

    Raises:
        ImportError: `safetensors` is not installed.
    """
    safetensors = _import_safetensors()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    identity = secrets.token_hex(8)  # not from PyTorch's random numbers, which a save must not move
    state = {
        "id": identity,
        "step": step,
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    training, unfinished = _training(path, identity), path / f"{_WEIGHTS}.unfinished"
    torch.save(state, training)
    safetensors.torch.save_model(_plain(model), str(unfinished), {"id": identity})
    for written in (training, unfinished, path):
        _flush(written)
    # From here on the folder's checkpoint is the new one, as the weights name the rest.
    os.replace(unfinished, path / _WEIGHTS)
    _flush(path)
    for other in path.glob(_training(path, "[0-9a-f]" * len(identity)).name):
        if other != training:
            other.unlink()


def load(folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads back the last checkpoint that `save` completed, into a model and an optimizer of the same shape.

    Returns:
        the step to go on with.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: the folder holds no checkpoint, or not both files of one.
        ValueError: its two files are not of one save, or not from `save` at all.
        RuntimeError: the weights do not fit the model.
    """
    safetensors = _import_safetensors()
    path = Path(folder)
    if not (path / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} holds no checkpoint: {_WEIGHTS} is missing")
    with safetensors.safe_open(path / _WEIGHTS, framework="pt") as weights:
        identity = (weights.metadata() or {}).get("id")
    if identity is None:
        raise ValueError(f"{path / _WEIGHTS} names no checkpoint; it was not written by save()")
    training = _training(path, identity)
    if not training.is_file():
        raise FileNotFoundError(
            f"{path} holds no whole checkpoint: {training.name} of its weights is missing"
        )
    state = torch.load(training, map_location="cpu", weights_only=True)
    if state["id"] != identity:
        raise ValueError(f"{path} has the weights of save {identity} beside the optimizer of {state['id']}")
    safetensors.torch.load_model(_plain(model), path / _WEIGHTS)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    return state["step"]


def _training(path: Path, identity: str) -> Path:
    return path / f"training-{identity}.pt"


def _plain(model: nn.Module) -> nn.Module:
    """The module itself where torch.compile wrapped it, whose names have a prefix."""
    return getattr(model, "_orig_mod", model)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _import_safetensors() -> Any:
    try:
        import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from error
    return import_module("safetensors")
