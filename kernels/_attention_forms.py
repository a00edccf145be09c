"""How attention's loops get their rows: by pointers, by tensor descriptors, or by descriptors with specialized warps;
and whether dq is added up by atomics.

"pointers" serves every call. "descriptors" loads a tile of rows with one instruction of one thread (sm_90's bulk
tensor copies), which leaves the other threads the registers and instructions of the addresses. "specialized" has the
compiler give the loads to a warp of their own and each half of the tile to a warp group of its own. "warp_groups" does
the same by hand, in Gluon, for the forward, dq, and dk and dv, so that a group's exponentials run beside its own next
product. "reduction" is "descriptors" with dq added up beside dk, tile by tile in memory: fewer products, and not the
same bits on every run. A call that asks for these has the kernels of "descriptors" instead.

Nothing of this has been measured on a GPU: "pointers" is what a call gets, the others what `config=` of the launchers,
the benchmarks' providers and the tests ask for. Imports no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fastattn.kernels._attention_config import pointers_config, select_attention_config
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import ceil_div
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import Target

FORMS = ("pointers", "descriptors", "specialized", "reduction", "warp_groups")
SHIPPED_FORM = "pointers"

# For sm_90 and 16 bits, by form and padded head dimension. All compiled (tests/kernels/test_attention_forms_code.py: no
# spills, HGMMA, bulk loads, shared memory within the limit), none measured.
# "descriptors" have the fewest instructions a score that do not spill, but for the forward at 64: there 64 keys a tile
# leave room for two programs a multiprocessor. dq has no specialized form: the compiler cannot divide lse and delta.
_FORMS: dict[tuple[str, int], AttentionConfig] = {
    ("descriptors", 64): AttentionConfig(
        AttentionTiles(128, 64, 8, 2, "descriptors"),
        AttentionTiles(128, 64, 8, 2, "descriptors"),
        AttentionTiles(64, 128, 8, 2, "descriptors"),
    ),
    ("descriptors", 128): AttentionConfig(
        AttentionTiles(128, 128, 8, 2, "descriptors"),
        AttentionTiles(128, 64, 8, 2, "descriptors"),
        AttentionTiles(32, 128, 8, 2, "descriptors", one_loop=True),
    ),
    ("descriptors", 256): AttentionConfig(
        AttentionTiles(128, 64, 8, 2, "descriptors"),
        AttentionTiles(128, 32, 8, 2, "descriptors", one_loop=True),
        AttentionTiles(32, 128, 8, 2, "descriptors", one_loop=True),
        separate_dk_dv=True,
        dv=AttentionTiles(64, 128, 8, 2, "descriptors", one_loop=True),
    ),
}
_FORMS["specialized", 64] = replace(
    _FORMS["descriptors", 64],
    forward=AttentionTiles(128, 128, 4, 2, "specialized"),
    dk_dv=AttentionTiles(64, 128, 4, 2, "specialized"),
)
_FORMS["specialized", 128] = replace(
    _FORMS["descriptors", 128],
    forward=AttentionTiles(128, 128, 4, 2, "specialized"),
    dk_dv=AttentionTiles(32, 128, 4, 2, "specialized"),
)
_FORMS["specialized", 256] = replace(
    _FORMS["descriptors", 256], forward=AttentionTiles(128, 64, 4, 2, "specialized")
)
# At 128 two accumulators leave no registers for dq: dk takes it along, and dv a launch of its own, six products. At 256
# what dq needs of shared memory does not fit. sm_80 has no bulk reduction, and no tiles that gain by it.
_FORMS["reduction", 64] = replace(_FORMS["descriptors", 64], reduce_dq=True)
_FORMS["reduction", 128] = replace(
    _FORMS["descriptors", 128],
    dk_dv=AttentionTiles(64, 128, 8, 2, "descriptors", one_loop=True),
    dv=AttentionTiles(64, 128, 8, 2, "descriptors"),
    separate_dk_dv=True,
    reduce_dq=True,
)
_FORMS["warp_groups", 64] = replace(
    _FORMS["descriptors", 64],
    forward=AttentionTiles(128, 128, 4, 4, "warp_groups"),
    dq=AttentionTiles(128, 128, 4, 4, "warp_groups"),
    dk_dv=AttentionTiles(128, 128, 4, 4, "warp_groups"),
)
_FORMS["warp_groups", 128] = replace(
    _FORMS["descriptors", 128],
    forward=AttentionTiles(128, 128, 4, 2, "warp_groups"),
    dq=AttentionTiles(128, 128, 4, 3, "warp_groups"),
    dk_dv=AttentionTiles(64, 128, 4, 4, "warp_groups"),
)
_FORMS["warp_groups", 256] = replace(
    _FORMS["descriptors", 256],
    forward=AttentionTiles(128, 64, 4, 2, "warp_groups"),
    dq=AttentionTiles(128, 64, 4, 2, "warp_groups"),
    dk_dv=AttentionTiles(64, 128, 4, 2, "warp_groups"),
    dv=AttentionTiles(64, 128, 4, 2, "warp_groups"),
)


def select_attention_form(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    load: str,
    form: str,
    v_dim: int | None = None,
    narrow: bool = False,
) -> AttentionConfig:
    """The modelled config of a form, or that of "pointers" where `form_reason` says why there is none.

    What was measured goes before that of `SHIPPED_FORM`, in `select_attention_config`, and is of whatever form.
    """
    if form == "pointers" or form_reason(head_dim, dtype, target, load, form) is not None:
        return pointers_config(head_dim, dtype, target, load, v_dim, narrow)
    return _FORMS[form, _width(head_dim)]


def form_reason(head_dim: int, dtype: torch.dtype, target: Target, load: str, form: str) -> str | None:
    """Why a form has no tiles for a kind of call, or None.

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}")
    if form == "pointers":
        return None
    if (target.backend, target.arch) != ("cuda", 90):
        name = f"sm_{target.arch}" if target.backend == "cuda" else target.arch or target.backend
        return f"{form} has tiles for sm_90 alone, not for {name}"
    if dtype.itemsize != 2:
        return f"{form} has tiles for 16-bit inputs alone, not for {dtype}"
    if (form, _width(head_dim)) not in _FORMS:
        widest = max(width for name, width in _FORMS if name == form)
        return f"head_dim={head_dim} must be at most {widest} for {form}"
    if load != "plain":
        return (
            f"{form} has tiles for scores that nothing but a causal mask modifies, not for a load of {load!r}"
        )
    return _gluon_reason() if form == "warp_groups" else None


@cache
def _gluon_reason() -> str | None:
    """Why the kernel in Gluon, which Triton calls experimental and may change, cannot be had, or None."""
    try:
        import fastattn.kernels.attention_backward_dk_dv_warp_groups
        import fastattn.kernels.attention_backward_dq_warp_groups
        import fastattn.kernels.attention_forward_warp_groups  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        return f"warp_groups needs Triton's Gluon as of 3.6 to 3.9: {type(error).__name__}: {error}"
    return None


def warp_groups_reason(q: Tensor, target: Target, asked: AttentionOptions) -> str | None:
    """Why the forward by warp groups cannot serve a call that descriptors of k and v can, or None."""
    if (target.backend, target.arch) != ("cuda", 90):
        return f"warp_groups is written for sm_90, not for {target.name}"
    if asked.scale <= 0.0:
        return (
            f"scale={asked.scale} must be above 0 for warp_groups, whose largest product is the largest score"
        )
    return layout_reason((q,), asked) or _gluon_reason()


def dq_warp_groups_reason(target: Target) -> str | None:
    """Why dq by warp groups cannot serve a call that descriptors of q, k, v and dO can, or None."""
    if (target.backend, target.arch) != ("cuda", 90):
        return f"warp_groups is written for sm_90, not for {target.name}"
    return _gluon_reason()


def dk_dv_warp_groups_reason(lse: Tensor, block_m: int, target: Target) -> str | None:
    """Why dk and dv by warp groups cannot serve a call that descriptors of q and dO can, or None."""
    if (target.backend, target.arch) != ("cuda", 90):
        return f"warp_groups is written for sm_90, not for {target.name}"
    rows = lse.shape[0] * lse.shape[1] * ceil_div(lse.shape[2], block_m) * block_m
    if 2 * rows >= 2**31:
        return (
            f"2 * {rows} rows of all heads must be below 2**31 for warp_groups, whose descriptor counts them"
        )
    return _gluon_reason()


def layout_reason(tensors: Sequence[Tensor], asked: AttentionOptions) -> str | None:
    """Why descriptors cannot read the rows of these tensors (batch, heads, seq, width), or None.

    A descriptor's bounds are the tensor's own: rows beyond a sequence's end or among its hidden keys would be loaded,
    and a NaN there times a weight of 0 is NaN.
    """
    if asked.cu_seqlens_q is not None:
        return "packed sequences end within the tensor, descriptors at its end"
    if asked.key_lengths is not None:
        return "key_lengths hides keys within the tensor, descriptors end at its end"
    for tensor in tensors:
        if tensor.numel() == 0:
            return f"a tensor of shape {tuple(tensor.shape)} has no rows, and a descriptor needs one"
        stride_b, stride_h, stride_m, _ = tensor.stride()
        if stride_b > 0 and stride_h > 0 and stride_m > 0:
            bytes_apart = (stride_b | stride_h | stride_m) * tensor.itemsize
            if (tensor.data_ptr() | bytes_apart) % _ALIGNMENT == 0:
                continue  # as almost always; the rest finds the reason
        if tensor.data_ptr() % _ALIGNMENT:
            return (
                f"an address of {tensor.data_ptr() % _ALIGNMENT} modulo {_ALIGNMENT} must be a multiple of it"
            )
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            if size > 1 and (stride <= 0 or stride * tensor.itemsize % _ALIGNMENT):
                return f"a stride of {stride * tensor.itemsize} bytes must be a positive multiple of {_ALIGNMENT}"
    return None


# Bytes: of the base and of every stride of a descriptor (CUDA driver API, cuTensorMapEncodeTiled).
_ALIGNMENT = 16


def fitting_config(
    config: AttentionConfig | None,
    described: bool,
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    load: str,
    v_dim: int | None = None,
    narrow: bool = False,
) -> AttentionConfig:
    """The config of a launch if it can read the tensors: the given one, the measured one or the shipped form's.

    Else the modelled one of "pointers", whatever was given or measured: tiles for descriptors need not fit without.
    `described`: whether descriptors can read the tensors, see `layout_reason`.
    """
    if config is None:
        config = select_attention_config(head_dim, dtype, target, load, v_dim, narrow)
    if not uses_descriptors(config):
        return config
    # With specialized warps, a loop that loads more than its rows is not known to compile.
    forms = {tiles.form for tiles in _tiles_of(config)}
    plain = "specialized" in forms or "warp_groups" in forms
    if described and (load == "plain" or not plain):
        return config
    return pointers_config(head_dim, dtype, target, load, v_dim, narrow)


def uses_descriptors(config: AttentionConfig) -> bool:
    return any(tiles.descriptors for tiles in _tiles_of(config))


def _tiles_of(config: AttentionConfig) -> tuple[AttentionTiles, ...]:
    """Those of the kernels that have forms."""
    return config.forward, config.dq, config.dk_dv, config.dv or config.dk_dv


def _width(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256 if head_dim <= 256 else 512
