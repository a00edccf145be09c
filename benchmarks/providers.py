"""Who is measured: one decorated function a provider.

A provider takes a case and a device and returns a function of the case's inputs, or raises `Absent` with the
reason why it cannot run there; a call that raises `NotSupported` counts as absent too. Absent providers are
printed, not dropped. To measure a kernel of your own, decorate a function in the same way:

    @provider("gelu", "mine")
    def mine(case, device):
        return lambda x: my_gelu(x, case.approximate)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastattn
from benchmarks.cases import AttentionCase, BlockCase, GeluCase, LayerNormCase, LossCase, MlpCase, call_block
from fastattn import dispatch, reference

Function = Callable[..., Tensor]
Provider = Callable[[Any, torch.device], Function]

# operation -> name -> provider, in the order of the tables
PROVIDERS: dict[str, dict[str, Provider]] = {
    operation: {} for operation in ("attention", "layer_norm", "gelu", "mlp", "loss", "block")
}
BASELINES = ("naive", "torch")
# (operation, provider, direction) -> what a reader of its time must know
NOTES: dict[tuple[str, str, str], str] = {}
_COMPILED_LENGTH = 1024


class Absent(Exception):
    """A provider cannot run here; the message says why."""


def provider(operation: str, name: str) -> Callable[[Provider], Provider]:
    """Decorator: registers a provider of an operation under a name.

    Raises:
        ValueError: the operation is unknown, or the name is taken.
    """
    if operation not in PROVIDERS:
        raise ValueError(f"operation={operation!r} is unknown; there are {', '.join(PROVIDERS)}")
    if name in PROVIDERS[operation]:
        raise ValueError(f"operation {operation!r} has a provider {name!r} already")

    def register(function: Provider) -> Provider:
        PROVIDERS[operation][name] = function
        return function

    return register


def _compiled(function: Function, device: torch.device) -> Function:
    """torch.compile of a function, for the shapes of one case alone."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _refuse_interpreter(device: torch.device) -> None:
    if device.type == "cpu" and dispatch.INTERPRETING:
        raise Absent("TRITON_INTERPRET is set: Triton's interpreter is for tests, its time says nothing")


@provider("attention", "naive")
def attention_naive(case: AttentionCase, device: torch.device) -> Function:
    return lambda q, k, v: _tensor(reference.attention(q, k, v, causal=case.causal))


@provider("attention", "torch")
def attention_torch(case: AttentionCase, device: torch.device) -> Function:
    """PyTorch's own choice of back end; bottom-right alignment is its CausalBias, which its GPU back ends know."""
    _, heads, kv_heads, seq_q, seq_k, _ = case.shape
    mask: Tensor | None = None
    if case.causal == "bottom_right" and seq_q != seq_k:
        mask = causal_lower_right(seq_q, seq_k)
        if device.type != "cuda":
            mask = reference.causal_mask(seq_q, seq_k, case.causal, device)
    is_causal = bool(case.causal) and mask is None
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, enable_gqa=heads != kv_heads
    )


@provider("attention", "torch-compile")
def attention_compile(case: AttentionCase, device: torch.device) -> Function:
    """torch.compile of the naive formula; on a GPU at a training's usual length alone, as each case compiles anew."""
    if device.type == "cuda" and case.seq_q > _COMPILED_LENGTH:
        raise Absent(
            f"compiled at up to {_COMPILED_LENGTH:,} tokens only: each case takes as long as all others"
        )
    return _compiled(attention_naive(case, device), device)


def _forced(backend: SDPBackend) -> Provider:
    def forced(case: AttentionCase, device: torch.device) -> Function:
        if device.type != "cuda":
            raise Absent(f"a GPU's back end; the device is {device.type}")
        function = attention_torch(case, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return function(q, k, v)

        return call

    return forced


provider("attention", "sdpa-flash")(_forced(SDPBackend.FLASH_ATTENTION))
provider("attention", "sdpa-efficient")(_forced(SDPBackend.EFFICIENT_ATTENTION))
provider("attention", "sdpa-cudnn")(_forced(SDPBackend.CUDNN_ATTENTION))
provider("attention", "sdpa-math")(_forced(SDPBackend.MATH))


def _attention_ours(implementation: str | None) -> Provider:
    def ours(case: AttentionCase, device: torch.device) -> Function:
        if implementation != "torch":
            _refuse_interpreter(device)
        return lambda q, k, v: _tensor(
            fastattn.attention(q, k, v, causal=case.causal, implementation=implementation)
        )

    return ours


provider("attention", "fastattn")(_attention_ours(None))
provider("attention", "fastattn-triton")(_attention_ours("triton"))
provider("attention", "fastattn-torch")(_attention_ours("torch"))


@provider("layer_norm", "naive")
def layer_norm_naive(case: LayerNormCase, device: torch.device) -> Function:
    return lambda x, *affine: reference.layer_norm(x, case.width, *affine)


@provider("layer_norm", "torch")
def layer_norm_torch(case: LayerNormCase, device: torch.device) -> Function:
    return lambda x, *affine: F.layer_norm(x, (case.width,), *affine)


@provider("layer_norm", "torch-compile")
def layer_norm_compile(case: LayerNormCase, device: torch.device) -> Function:
    return _compiled(layer_norm_naive(case, device), device)


def _layer_norm_ours(implementation: str | None) -> Provider:
    def ours(case: LayerNormCase, device: torch.device) -> Function:
        if implementation != "torch":
            _refuse_interpreter(device)
        shape = (case.width,)
        return lambda x, *affine: fastattn.layer_norm(x, shape, *affine, implementation=implementation)

    return ours


provider("layer_norm", "fastattn")(_layer_norm_ours(None))
provider("layer_norm", "fastattn-triton")(_layer_norm_ours("triton"))
provider("layer_norm", "fastattn-torch")(_layer_norm_ours("torch"))


@provider("gelu", "naive")
def gelu_naive(case: GeluCase, device: torch.device) -> Function:
    return lambda x: reference.gelu(x, case.approximate)


@provider("gelu", "torch")
def gelu_torch(case: GeluCase, device: torch.device) -> Function:
    return lambda x: F.gelu(x, approximate=case.approximate)


@provider("gelu", "torch-compile")
def gelu_compile(case: GeluCase, device: torch.device) -> Function:
    return _compiled(gelu_naive(case, device), device)


def _gelu_ours(implementation: str | None) -> Provider:
    def ours(case: GeluCase, device: torch.device) -> Function:
        if implementation != "torch":
            _refuse_interpreter(device)
        return lambda x: fastattn.gelu(x, case.approximate, implementation=implementation)

    return ours


provider("gelu", "fastattn")(_gelu_ours(None))
provider("gelu", "fastattn-triton")(_gelu_ours("triton"))
provider("gelu", "fastattn-torch")(_gelu_ours("torch"))


def _mlp(gelu: Callable[[Tensor, str], Tensor]) -> Provider:
    def provide(case: MlpCase, device: torch.device) -> Function:
        return lambda x, w1, b1, w2, b2: F.linear(gelu(F.linear(x, w1, b1), case.approximate), w2, b2)

    return provide


provider("mlp", "naive")(_mlp(reference.gelu))
provider("mlp", "torch")(_mlp(lambda x, approximate: F.gelu(x, approximate=approximate)))


@provider("mlp", "torch-compile")
def mlp_compile(case: MlpCase, device: torch.device) -> Function:
    return _compiled(PROVIDERS["mlp"]["torch"](case, device), device)


@provider("mlp", "fastattn")
def mlp_ours(case: MlpCase, device: torch.device) -> Function:
    """PyTorch's products around our GELU; they are not fused yet."""
    _refuse_interpreter(device)
    return _mlp(fastattn.gelu)(case, device)


@provider("loss", "naive")
def loss_naive(case: LossCase, device: torch.device) -> Function:
    targets = case.targets(device)

    def naive(logits: Tensor) -> Tensor:
        chosen = (
            torch.log_softmax(logits.float(), dim=1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        )
        kept = targets != -100
        return (-(chosen * kept).sum() / kept.sum()).to(logits.dtype)

    return naive


@provider("loss", "torch")
def loss_torch(case: LossCase, device: torch.device) -> Function:
    targets = case.targets(device)
    return lambda logits: F.cross_entropy(logits, targets)


@provider("loss", "torch-compile")
def loss_compile(case: LossCase, device: torch.device) -> Function:
    return _compiled(loss_naive(case, device), device)


@provider("loss", "fastattn")
def loss_ours(case: LossCase, device: torch.device) -> Function:
    raise Absent("fastattn has no fused cross-entropy yet")


def _block(implementation: str, compiles: bool = False) -> Provider:
    def provide(case: BlockCase, device: torch.device) -> Function:
        if implementation == "fastattn":
            _refuse_interpreter(device)
        block = case.block(implementation, device)
        if compiles:
            block.compile(dynamic=False)
        return lambda x, *parameters: call_block(block, x, *parameters)

    return provide


for _name, _implementation, _compiles in (
    ("naive", "naive", False),
    ("torch", "torch", False),
    ("torch-compile", "torch", True),
    ("fastattn", "fastattn", False),
    ("fastattn-compile", "fastattn", True),
):
    provider("block", _name)(_block(_implementation, _compiles))


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
