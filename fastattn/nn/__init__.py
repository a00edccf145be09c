"""Modules in the place of torch.nn's: the same parameters, initial values and state dicts, other kernels.

MLP and the gated linear layers have no counterpart there, and hold torch.nn.Linear layers.

Each takes `implementation=` ("triton", "torch", "reference", or None for the first that can), as fastattn's
functions do.
"""

from fastattn.nn.activation import GEGLU, GELU, ReGLU, SwiGLU
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastattn.nn.mlp import MLP
from fastattn.nn.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GEGLU",
    "GELU",
    "MLP",
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "ReGLU",
    "RotaryEmbedding",
    "SwiGLU",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
