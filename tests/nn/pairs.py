"""A drop-in beside its counterpart: both with the same random parameters, their results and gradients compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.testing import make_tensor
from tests.models.agreement import assert_near

IMPLEMENTATIONS = (None, "torch", "reference")

EMBED, HEADS, BATCH, SEQ_Q, SEQ_K = 32, 4, 2, 9, 13


def make_pair(
    ours: type, theirs: type, device: torch.device, *arguments: Any, **keywords: Any
) -> tuple[Any, Any]:
    """Both modules with torch.nn's state dict, every parameter random."""
    implementation = keywords.pop("implementation", None)
    peer = theirs(*arguments, **keywords).to(device)
    for seed, parameter in enumerate(peer.parameters()):
        parameter.data.copy_(make_tensor(*parameter.shape, seed=seed) * 0.3)
    module = ours(*arguments, **keywords, implementation=implementation).to(device)
    module.load_state_dict(peer.state_dict())
    return module, peer


def assert_same(
    module: torch.nn.Module, peer: torch.nn.Module, call: Callable[..., Any], *inputs: Tensor
) -> None:
    """Output and the gradients of parameters and inputs."""
    results = []
    for m in (module, peer):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = call(m, *leaves)
        m.zero_grad()
        out.backward(make_tensor(*out.shape, seed=99, device=out.device).to(out.dtype))
        gradients = {name: p.grad for name, p in m.named_parameters()}
        results.append((out, gradients, [leaf.grad for leaf in leaves]))
    (out, gradients, input_gradients), (peer_out, peer_gradients, peer_input_gradients) = results
    assert_near(out, peer_out)
    for name, gradient in gradients.items():
        assert_near(gradient, peer_gradients[name], name=f"gradient of {name}")
    for gradient, peer_gradient in zip(input_gradients, peer_input_gradients, strict=True):
        assert_near(gradient, peer_gradient, name="gradient of an input")


def padding_mask(seq: int, device: torch.device, batch: int = BATCH) -> Tensor:
    """True hides; every sequence hides another number of its last keys."""
    return torch.arange(seq, device=device) >= seq - 3 + torch.arange(batch, device=device)[:, None]


def causal_mask(seq: int, device: torch.device) -> Tensor:
    return torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)
