"""An example for `python -m benchmarks run --with FILE`: a GELU of one's own beside PyTorch's and ours.

    python -m benchmarks run --suite mlp --with benchmarks/example_provider.py

x * sigmoid(1.702 x) is the approximation of Hendrycks and Gimpel (2016): quick, and so far from the exact function
that the check before the timing lists it as wrong. Put your own kernel in its place.
"""

import torch
from torch import Tensor

from benchmarks.cases import GeluCase
from benchmarks.providers import Function, provider


@provider("gelu", "sigmoid-approximation")
def sigmoid_approximation(case: GeluCase, device: torch.device) -> Function:
    def gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    return gelu
