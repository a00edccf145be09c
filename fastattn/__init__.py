"""Fast attention, LayerNorm and GELU for PyTorch, in Triton kernels that say when they run and why not.

Importing this package needs neither a GPU nor Triton, and changes nothing in any other package.
"""

from fastattn import nn, reference
from fastattn.dispatch import Explanation, NotSupported, explain, use_implementation
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.gelu import gelu
from fastattn.ops.layer_norm import layer_norm

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "NotSupported",
    "__version__",
    "attention",
    "explain",
    "gelu",
    "layer_norm",
    "nn",
    "reference",
    "scaled_dot_product_attention",
    "use_implementation",
]
