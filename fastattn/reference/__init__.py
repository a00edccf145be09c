"""The naive PyTorch maths: the truth that tests measure against, and the baseline of the benchmarks.

Every function works in the dtype of its inputs: given float64 inputs it is the truth, given bfloat16 inputs it
is what a plain PyTorch program computes.
"""

from fastattn.reference.activation import bias_gelu, geglu, gelu, mlp, reglu, swiglu
from fastattn.reference.attention import (
    attention,
    attention_varlen,
    causal_mask,
    scaled_dot_product_attention,
    window_mask,
)
from fastattn.reference.e4m3 import round_e4m3, round_e4m3_varlen
from fastattn.reference.loss import cross_entropy, linear_cross_entropy
from fastattn.reference.norm import layer_norm, residual_sum, rms_norm
from fastattn.reference.rotary import rotary_embedding

__all__ = [
    "attention",
    "attention_varlen",
    "bias_gelu",
    "causal_mask",
    "cross_entropy",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "reglu",
    "residual_sum",
    "rms_norm",
    "rotary_embedding",
    "round_e4m3",
    "round_e4m3_varlen",
    "scaled_dot_product_attention",
    "swiglu",
    "window_mask",
]
