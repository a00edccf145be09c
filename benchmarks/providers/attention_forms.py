"""Attention's forms that no call takes by itself: bulk loads by descriptors, specialized warps (the
compiler's and Gluon's), dq by bulk reductions.

They are beside the operation as it ships so that a run on a GPU can say which is the faster; see
`fastattn.kernels._attention_forms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AttentionCase
from benchmarks.providers.attention import refuse_options
from benchmarks.providers.registry import Absent, Function, Provider, provider, refuse_interpreter
from fastattn.ops._attention_call import options_of


class _FormFunction(torch.autograd.Function):
    """The launchers with a config of their own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool | str, config: Any) -> Tensor:
        from fastattn.kernels.attention_forward import attention_forward

        ctx.options, ctx.config = options_of(q, k, causal, None, None), config
        out, lse = attention_forward(q, k, v, *ctx.options, config=config)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from fastattn.kernels.attention_backward import attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], False, False]
        gradients = attention_backward(dout, None, q, k, v, out, lse, needs, *ctx.options, config=ctx.config)
        return (
            *(g if needed else None for g, needed in zip(gradients[:3], needs, strict=False)),
            None,
            None,
        )


def _form(form: str) -> Provider:
    def formed(case: AttentionCase, device: torch.device) -> Function:
        from fastattn.kernels import _target
        from fastattn.kernels._attention_forms import form_reason, select_attention_form

        if device.type != "cuda":
            raise Absent(f"a GPU's form; the device is {device.type}")
        refuse_interpreter(device)
        refuse_options(case, "forms have tiles for plain scores alone")
        target = _target.target_of(device)
        reason = form_reason(case.head_dim, case.dtype, target, "plain", form)
        if reason is not None:
            raise Absent(reason)
        config = select_attention_form(case.head_dim, case.dtype, target, "plain", form)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Tensor = _FormFunction.apply(q, k, v, case.causal, config)
            return result

        return call

    return formed


provider("attention", "fastattn-descriptors")(_form("descriptors"))
provider("attention", "fastattn-specialized")(_form("specialized"))
provider("attention", "fastattn-reduction")(_form("reduction"))
provider("attention", "fastattn-warp-groups")(_form("warp_groups"))
