"""Attention's forward on tensors like those of a call before: of which alone the addresses are not known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import Rows, rows_of, score_of, sequences_of
from fastattn.kernels._attention_plan import forward_layout, forward_plan
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_out
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._plan import Constants
from fastattn.kernels.attention_forward import _attention_forward_kernel


class PlainForward(NamedTuple):
    """How a call that modifies no score is launched: of all tensors of the same shapes, strides, dtypes and device.

    Attributes:
        rows: the fields of `Rows` behind the pointer, of q, k, v and out.
        out: shape and strides, or None where `empty_like(q)` has them.
        lse: the shape.
        constants: all arguments of the kernel but the pointers, whose alignment alone is not known.
    """

    rows: tuple[tuple[Any, ...], ...]
    out: tuple[tuple[int, ...], tuple[int, ...]] | None
    lse: tuple[int, ...]
    grid: tuple[int, ...]
    constants: Constants

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse, as `attention_forward` has them."""
        out = torch.empty_like(q) if self.out is None else q.new_empty_strided(*self.out)
        lse = torch.empty(self.lse, dtype=torch.float32, device=q.device)
        of_q, of_k, of_v, of_out = self.rows
        with _target.launching_on(q):
            launch(
                _attention_forward_kernel,
                self.grid,
                self.constants,
                by=(q, k, v, out, lse),
                q=Rows(q, *of_q),
                k=Rows(k, *of_k),
                v=Rows(v, *of_v),
                out=Rows(out, *of_out),
                lse_ptr=lse,
            )
        return out, lse


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *options: object) -> PlainForward | None:
    """How tensors like these are launched without options but a causal mask.

    None where that is not all: without queries or keys, with splits of the keys, copies, or rows by descriptors.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    if q.numel() == 0 or v.numel() == 0:
        return None
    plan = forward_plan(*forward_layout(q, k, v, asked, None))
    tiles, grid, constants = plan.forward
    if not all(plan.in_place) or plan.combine is not None or tiles.form != "pointers":
        return None
    out = empty_out(q, v)
    like_q = torch.empty_like(q).stride() == out.stride() and q.shape == out.shape
    rest: dict[str, Any] = {
        "score": score_of(asked, q), "sequences": sequences_of(asked), "sinks_ptr": None,
        "SEQ_K": k.size(2), "MAX_SEQ_K": k.size(2),
    }  # fmt: skip
    return PlainForward(
        tuple(tuple(rows_of(tensor)[1:]) for tensor in (q, k, v, out)),
        None if like_q else (tuple(out.shape), out.stride()),
        tuple(q.shape[:3]),
        grid,
        Constants(constants, **rest),
    )
