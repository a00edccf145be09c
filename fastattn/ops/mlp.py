"""The MLP: argument checks, the choice of a path, public function; its autograd Function is in `_mlp_function`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.dispatch import (
    Implementation,
    Operation,
    autocasts,
    refuse_transforms,
    refuse_triton,
)
from fastattn.kernels import _target
from fastattn.kernels._linear_config import select_mlp_path, widest_fused
from fastattn.kernels._plan import planned
from fastattn.ops._activations import TORCH_ACTIVATIONS
from fastattn.ops._autograd import needs_graph
from fastattn.ops._check import check_floating, check_same_device
from fastattn.ops._mlp_function import MlpFunction, composed, without_graph

SAVES = ("both", "pre_activation", "input")


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save: str
) -> None:
    if activation not in TORCH_ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} must be one of {', '.join(map(repr, TORCH_ACTIVATIONS))}"
        )
    if save not in SAVES:
        raise ValueError(f"save={save!r} must be one of {', '.join(map(repr, SAVES))}")
    # The usual case at once, at half the host time. Not while the compiler traces.
    if not torch.compiler.is_compiling() and _fit(x, w1, b1, w2, b2):
        return
    needed = ("x", "fc1_weight", "fc2_weight")
    check_floating(*needed, x=x, fc1_weight=w1, fc1_bias=b1, fc2_weight=w2, fc2_bias=b2)
    check_same_device("x", x, fc1_weight=w1, fc1_bias=b1, fc2_weight=w2, fc2_bias=b2)
    if x.dim() == 0 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"x, fc1_weight and fc2_weight have {x.dim()}, {w1.dim()} and {w2.dim()} dimensions; "
            "(..., width), (hidden, width) and (out, hidden) are needed"
        )
    if w1.size(1) != x.size(-1):
        raise ValueError(
            f"fc1_weight has shape {tuple(w1.shape)}; x's width={x.size(-1)} must be its second size"
        )
    if w2.size(1) != w1.size(0):
        raise ValueError(
            f"fc2_weight has shape {tuple(w2.shape)}; hidden={w1.size(0)} must be its second size"
        )
    for name, bias, weight in (("fc1_bias", b1, w1), ("fc2_bias", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; ({weight.size(0)},) is needed")
    if not autocasts(x):
        _check_dtypes(x, w1, b1, w2, b2)


def _fit(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> bool:
    """Whether the tensors are right without a doubt; where not, `_check` says what is wrong, if anything is."""
    try:
        dtype, device = x.dtype, x.device
        (hidden, width), (out, inner) = w1.shape, w2.shape
        return (
            width == x.size(-1)
            and inner == hidden
            and dtype.is_floating_point
            and w1.dtype == w2.dtype == dtype
            and w1.device == w2.device == device
            and (b1 is None or (b1.shape == (hidden,) and b1.dtype == dtype and b1.device == device))
            and (b2 is None or (b2.shape == (out,) and b2.dtype == dtype and b2.device == device))
        )
    except (AttributeError, IndexError, ValueError):  # no tensors, or of other dimensions
        return False


def _check_dtypes(x: Tensor, *parameters: Tensor | None) -> None:
    for name, tensor in zip(("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), parameters, strict=True):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype={tensor.dtype}, but x has {x.dtype}")


def _cast(*arguments: Any) -> tuple[Any, ...]:
    """Autocast as for PyTorch's linear layers: all tensors but those in float64 take the autocast dtype."""
    dtype = torch.get_autocast_dtype(arguments[0].device.type)
    tensors = [t if t is None or t.dtype in (dtype, torch.float64) else t.to(dtype) for t in arguments[:5]]
    _check_dtypes(*tensors)
    return *tensors, *arguments[5:]


def _refuse_triton(x: Tensor, *others: Any) -> str | None:
    return refuse_triton(x, x.dtype)


def _refuse_fused(x: Tensor, *others: Any) -> str | None:
    if dispatch.INTERPRETING and x.dtype == torch.bfloat16 and not dispatch.interpreter_multiplies_bfloat16:
        return "Triton's interpreter multiplies bfloat16 as integers"
    return refuse_triton(x, x.dtype)


def _choice(x: Tensor, w1: Tensor) -> tuple[str, str]:
    """The path and the reason."""
    width, hidden = w1.size(1), w1.size(0)
    if torch.compiler.is_compiling():
        # By the widths alone: the compiler would compile again for another number of rows.
        widest = _widest_fused(x.dtype, x.device.type, x.device.index)
        if width <= widest and width % 16 == 0 and hidden % 16 == 0:
            return "fused", f"in many rows fusing is modelled as faster up to width={widest}"
        return "separate", f"in many rows fusing is modelled as faster only in multiples of 16 up to {widest}"
    return _known_choice(x.numel() // max(1, width), width, hidden, x.dtype, _target.target_of(x.device))


_known_choice = planned(select_mlp_path)


def _widest_fused(dtype: torch.dtype, device: str, index: int | None) -> int:
    found = torch.device(device) if index is None else torch.device(device, index)
    return widest_fused(dtype, _target.target_of(found))


# What torch.compiler.assume_constant_result sets; that function would import the compiler.
_widest_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step_aside(x: Tensor, w1: Tensor, b1: Any, w2: Any, b2: Any, activation: str, save: str) -> str | None:
    if torch.compiler.is_compiling() and save == "both":
        path, reason = _choice(x, w1)
        if path == "separate":
            return f"torch.compile fuses what stands between the library's products as well, and {reason}"
    return None


def _run_path(path: str, *arguments: Any) -> Tensor:
    tensors, (activation, save) = arguments[:5], arguments[5:]
    if needs_graph(*tensors):
        if torch.compiler.is_compiling():
            # The compiler refuses a Function that is given one tensor twice.
            tensors = (tensors[0], *(None if t is None else t.view_as(t) for t in tensors[1:]))
        return MlpFunction.apply(*tensors, activation, save, path)
    x, w1, b1, w2, b2 = tensors
    return without_graph(x, w1, b1, w2, b2, activation, path)


def _run_triton(x: Tensor, w1: Tensor, *others: Any) -> Tensor:
    return _run_path(_choice(x, w1)[0], x, w1, *others)


def _run_torch(*arguments: Any) -> Tensor:
    # What PyTorch keeps is "both"; only to keep less, or to say so, takes a Function of our own.
    if arguments[6] == "both" or not needs_graph(*arguments[:5]):
        return composed(*arguments[:6])
    return _run_path("torch", *arguments)


def _refuse_torch(*arguments: Any) -> str | None:
    if arguments[6] == "both" or not needs_graph(*arguments[:5]):
        return None
    reason = refuse_transforms()
    return None if reason is None else f"save={arguments[6]!r}: {reason}"


def _by_name(path: str) -> Implementation:
    return Implementation(
        f"triton-{path}",
        run=partial(_run_path, path),
        refuse=_refuse_fused if path == "fused" else _refuse_triton,
        describe=lambda *arguments: f"the {path} path, whatever the shape",
        only_by_name=True,
    )


_MLP = Operation(
    "mlp",
    _check,
    (
        Implementation(
            "triton",
            run=_run_triton,
            refuse=_refuse_triton,
            step_aside=_step_aside,
            describe=lambda *arguments: "path {!r}: {}".format(*_choice(*arguments[:2])),
        ),
        Implementation(
            "torch",
            run=_run_torch,
            refuse=_refuse_torch,
            describe=lambda *arguments: "PyTorch's linear layers and activation",
        ),
        Implementation(
            "reference",
            run=lambda *arguments: reference.mlp(*arguments[:5], activation=arguments[5]),
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators",
            only_by_name=True,
        ),
        _by_name("fused"),
        _by_name("separate"),
    ),
    cast=_cast,
)


@_MLP.public
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    save: str = "both",
    implementation: str | None = None,
) -> Tensor:
    r"""The MLP of a Transformer's block, two linear layers with an activation between them.

    .. math::
        y = \operatorname{activation}(x W_1^\top + b_1)\, W_2^\top + b_2

    Args:
        x: (..., width), any strides; float16, bfloat16 or float32 for Triton, any floating dtype otherwise.
        fc1_weight: W1, (hidden, width), of x's dtype, as all parameters; any strides.
        fc1_bias: b1, (hidden,), or None.
        fc2_weight: W2, (out, hidden).
        fc2_bias: b2, (out,), or None.
        activation: "gelu" (the exact one), "gelu_tanh", "gelu_quick", "relu" or "silu".
        save: what is kept of the hidden layer for the backward, of what its gradients need. "both": the argument of
            the activation and its value (of "relu" the value alone, which has the sign too). "pre_activation": the
            argument; the value is found from it in the pass of the backward that reads it anyway. "input": neither; the
            backward makes the first product again.
        implementation: "triton", "torch" or "reference" forces one, "triton-fused" or "triton-separate" a path of the
            first; None takes the first that can.

    Returns:
        y, (..., out), in x's dtype; under autocast in its dtype, as PyTorch's linear layers.

    Raises:
        TypeError: a tensor is not floating-point, or the dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or `activation`, `save` or `implementation` is unknown.
        NotSupported: the implementation asked for cannot take the call, or a second derivative is asked for where
            x was not kept.

    Notes:
        Triton has two paths. "fused": one product whose epilogue adds the bias and writes the argument of the
        activation and its value, and in the backward one that multiplies by the activation's derivative and sums
        the bias's gradient. "separate": the vendor's products, and each way a kernel of ours for what lies between. A
        model of the device, which no measurement stands behind yet, chooses by shape; `fastattn.explain` names the
        choice. The other products are the vendor's either way. The gradients are the same bits for any `save`, and, of
        what is ours, from run to run. The fused product reads x and the weights in place where one of their strides is
        1, and copies others; float32 is of full precision there, while PyTorch's settings hold for the vendor's
        products. Without gradients nothing is kept. Double backward goes through PyTorch's operators; with a frozen
        fc1_weight it needs save="input". The PyTorch implementation keeps "both" by itself, and a Function of its
        operators keeps less; within torch.func transforms that Function is refused.
        Under torch.compile the separate path steps aside for PyTorch's operators where save="both".

    Source:
        Vaswani et al., "Attention Is All You Need" (2017), section 3.3; Chen et al., "Training Deep Nets with Sublinear
        Memory Cost" (2016), for making again what was not kept.
    """
    return _MLP(implementation, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, save)
