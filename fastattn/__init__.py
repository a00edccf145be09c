"""Fast attention, LayerNorm and GELU for PyTorch, in Triton kernels that say when they run and why not.

Importing this package needs neither a GPU nor Triton, and changes nothing in any other package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastattn import nn, reference
from fastattn.dispatch import Explanation, NotSupported, debug_checks, explain, use_implementation
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen
from fastattn.ops.bias_gelu import bias_gelu
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.gated import geglu, reglu, swiglu
from fastattn.ops.gelu import gelu
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.mlp import mlp
from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops.rotary import rotary_embedding, rotary_embedding_qk, rotary_tables
from fastattn.ops.scaled_dot_product_attention import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "NotSupported",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "bias_gelu",
    "cross_entropy",
    "debug_checks",
    "explain",
    "flash_attn",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "models",
    "nn",
    "reference",
    "reglu",
    "rms_norm",
    "rotary_embedding",
    "rotary_embedding_qk",
    "rotary_tables",
    "scaled_dot_product_attention",
    "swiglu",
    "testing",
    "use_implementation",
]

if TYPE_CHECKING:
    from fastattn import flash_attn, models, testing
else:
    # Imported when they are first asked for. Type checkers do not see this function, so that to them a name
    # that does not exist stays an error.
    def __getattr__(name):
        if name in ("flash_attn", "models", "testing"):
            return import_module(f"fastattn.{name}")
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
