"""Small Transformer layers, ours beside torch.nn's with the same parameters, and their inputs."""

from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.nn.pairs import make_pair

EMBED, HEADS, HIDDEN, BATCH, SEQ, SEQ_MEMORY = 16, 2, 24, 2, 5, 7


LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


def layer_pair(name: str, device: torch.device, **keywords: Any) -> tuple[Any, Any]:
    """Both layers, without dropout unless it is asked for, batch first and of post-norm as torch.nn's is by default."""
    keywords = {"dropout": 0.0, "batch_first": True, **keywords}
    sizes = (EMBED, HEADS, HIDDEN)
    return make_pair(getattr(fastattn.nn, name), getattr(torch.nn, name), device, *sizes, **keywords)


def make_layer(name: str, device: torch.device | str = "cpu", **keywords: Any) -> Any:
    return layer_pair(name, torch.device(device), **keywords)[0]


def make_inputs(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """src, or tgt and memory."""
    lengths = (SEQ,) if name == LAYERS[0] else (SEQ, SEQ_MEMORY)
    shapes = [(BATCH, length, EMBED) for length in lengths]
    return [make_tensor(*shape, device=device, seed=n, dtype=dtype) for n, shape in enumerate(shapes, 40)]


def call_layer(m: torch.nn.Module, *inputs: Tensor) -> Tensor:
    return m(*inputs)
