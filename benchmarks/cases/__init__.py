"""What can be measured: a frozen shape of an operation, its inputs, and the formula that results are held against.

A case knows its name (for tables and test ids) and makes its own inputs, so that every provider gets the same
values in the same layout. benchmarks/suites.py says which cases are measured.
"""

from benchmarks.cases.attention import AttentionCase
from benchmarks.cases.attention_e4m3 import AttentionE4M3Case
from benchmarks.cases.base import DTYPE_NAMES, DTYPES, Case, draw, shape_of
from benchmarks.cases.loss import LinearLossCase, LossCase
from benchmarks.cases.mlp import BiasGeluCase, GegluCase, GeluCase, MlpCase, SwigluCase
from benchmarks.cases.model import BlockCase, GptCase, call_block
from benchmarks.cases.norm import AddLayerNormCase, AddRMSNormCase, LayerNormCase, RMSNormCase
from benchmarks.cases.rotary import RotaryCase

OpCase = (
    AttentionCase
    | LayerNormCase
    | AddLayerNormCase
    | GeluCase
    | BiasGeluCase
    | GegluCase
    | SwigluCase
    | MlpCase
    | LossCase
    | LinearLossCase
    | BlockCase
    | RotaryCase
)

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "AddLayerNormCase",
    "AddRMSNormCase",
    "AttentionCase",
    "AttentionE4M3Case",
    "BiasGeluCase",
    "BlockCase",
    "Case",
    "GegluCase",
    "GeluCase",
    "GptCase",
    "LayerNormCase",
    "LinearLossCase",
    "LossCase",
    "MlpCase",
    "OpCase",
    "RMSNormCase",
    "RotaryCase",
    "SwigluCase",
    "call_block",
    "draw",
    "shape_of",
]
