"""Modules in the place of torch.nn's: the same parameters, initial values and state dicts, other kernels.

Each takes `implementation=` ("triton", "torch", "reference", or None for the first that can), as fastattn's
functions do.
"""

from fastattn.nn.activation import GELU
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastattn.nn.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "GELU",
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
]
