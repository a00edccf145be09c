"""Attention's loops by pointers, by descriptors and with specialized warps: the same bits, and who serves what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks.providers.attention_forms import _FormFunction
from fastattn.kernels import _target
from fastattn.kernels._attention_config import score_load, select_attention_config
from fastattn.kernels._attention_forms import (
    FORMS,
    SHIPPED_FORM,
    fitting_config,
    form_reason,
    layout_reason,
    select_attention_form,
)
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
from fastattn.testing import make_tensor
from tests.attention_checks import RESULTS, AttentionCase, assert_attention_accurate

SM_90 = KNOWN_TARGETS["sm_90"]
# Of each of these, the same scores in the same order as "pointers" with the tiles of the interpreter.
VARIANTS = {
    "descriptors": AttentionTiles(32, 32, 1, 1, "descriptors"),
    "one-loop": AttentionTiles(32, 32, 1, 1, "pointers", one_loop=True),
    "specialized": AttentionTiles(32, 32, 1, 1, "specialized"),
}


def config_of(tiles: AttentionTiles) -> AttentionConfig:
    # dq has no specialized form.
    dq = tiles
    if tiles.form == "specialized":
        dq = AttentionTiles(32, 32, 1, 1, "descriptors", one_loop=True)
    return AttentionConfig(tiles, dq, tiles, delta=AttentionTiles(32, 32, 1, 1))


def run(inputs: dict[str, Tensor], options: AttentionOptions, config: AttentionConfig | None) -> list[Tensor]:
    """out, lse, dq, dk, dv from the launchers."""
    q, k, v, dout, dlse = inputs.values()
    out, lse = attention_forward(q, k, v, *options, config=config)
    needs = (True, True, True, False, False)
    return [
        out,
        lse,
        *attention_backward(dout, dlse, q, k, v, out, lse, needs, *options, config=config)[:3],
    ]


def options_of(case: AttentionCase, **others: Any) -> AttentionOptions:
    causal = {"right": 0 if case.causal else -1, "bottom_right": case.causal == "bottom_right"}
    return AttentionOptions(1.0 / math.sqrt(case.head_dim), **causal | others)


def assert_same_bits(
    inputs: dict[str, Tensor],
    options: AttentionOptions,
    fits: bool,
    variants: Sequence[str] = tuple(VARIANTS),
) -> list[Tensor]:
    """The results of pointers in two loops, which are those of all variants bit for bit.

    fits: whether the variants' own configs serve the call, or pointers instead of them.
    """
    # Given by name, as few queries would have tiles of their own.
    expected = run(inputs, options, select_attention_config(16, torch.float32, INTERPRETER))
    tensors = tuple(inputs[name] for name in ("q", "k", "v", "dout"))
    for variant in variants:
        config = config_of(VARIANTS[variant])
        described = layout_reason(tensors, options) is None
        served = fitting_config(config, described, 16, torch.bfloat16, INTERPRETER, score_load(options))
        assert (served is config) == (fits or variant == "one-loop")
        actual = run(inputs, options, config)
        for name, one, other in zip(RESULTS, actual, expected, strict=True):
            assert torch.equal(one, other), f"{name} of {variant}"
    return expected


def _beside_nan(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor within a larger one of NaN: rows behind the last, columns behind the last, heads between."""
    views = {}
    for name, tensor in inputs.items():
        if tensor.dim() == 3:
            views[name] = tensor
            continue
        batch, heads, seq, width = tensor.shape
        memory = tensor.new_full((batch + 1, seq + 64, heads + 1, width + 8), math.nan)
        views[name] = memory[:batch, :seq, :heads, :width].transpose(1, 2)
        views[name].copy_(tensor)
        if batch == 1:
            # The stride of a single element means nothing, and need not be one that a descriptor takes.
            views[name] = views[name].as_strided(views[name].shape, (3, *views[name].stride()[1:]))
    return views


CASES = [
    # Several tiles, odd lengths, grouped heads, a width that is no power of two.
    AttentionCase(2, 4, 2, 70, 45, 24, False),
    AttentionCase(1, 4, 2, 45, 70, 16, "top_left"),
    # The first 25 rows see no key.
    AttentionCase(1, 4, 1, 70, 45, 16, "bottom_right"),
    AttentionCase(1, 2, 2, 1, 33, 16, "bottom_right", dtype=torch.bfloat16),
    AttentionCase(1, 2, 1, 33, 1, 16, "top_left", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms_give_the_same_bits(case: AttentionCase, device: torch.device) -> None:
    """Among NaN, which a descriptor's zeros beyond the tensor keep out as a pointer's mask does."""
    inputs = case.inputs(device)
    actual = assert_same_bits(_beside_nan(inputs), options_of(case), fits=True)
    assert_attention_accurate(case, inputs, dict(zip(RESULTS, actual, strict=True)))


def _options(case: AttentionCase, device: torch.device) -> dict[str, dict[str, Any]]:
    shape = (case.batch, case.heads, case.seq_q, case.seq_k)
    mask = torch.rand(case.batch, 1, 1, case.seq_k, device=device) > 0.3
    return {
        "window": {"left": 9},
        "softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.rand(1, case.heads, device=device)},
        "bias-mask": {"bias": make_tensor(*shape, device=device, seed=7), "mask": mask},
        "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([3, 5], device=device)},
        "sinks": {"sinks": make_tensor(case.heads, device=device, seed=8)},
    }


@pytest.mark.parametrize("name", ["window", "softcap-alibi", "bias-mask", "dropout", "sinks"])
def test_forms_take_every_option(name: str, device: torch.device) -> None:
    """With two query heads a key head, of which one loop for both has to know which it is at."""
    case = AttentionCase(1, 2, 1, 40, 70, 16, "bottom_right")
    options = options_of(case, **_options(case, device)[name])
    assert_same_bits(case.inputs(device), options, True, ("descriptors", "one-loop"))


def _key_lengths(device: torch.device) -> dict[str, Any]:
    return {"key_lengths": torch.tensor([37], dtype=torch.int32, device=device)}


def _packed(device: torch.device) -> dict[str, Any]:
    starts = torch.tensor([0, 17, 40], dtype=torch.int32, device=device)
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 23, "max_seqlen_k": 23}


@pytest.mark.parametrize("made", [_key_lengths, _packed], ids=["key-lengths", "packed"])
def test_rows_within_a_tensor_fall_back_to_pointers(made: Any, device: torch.device) -> None:
    """NaN among the hidden keys, or in rows of no sequence, stays there."""
    case = AttentionCase(1, 2, 1, 45, 45, 16, "top_left")
    inputs, options = case.inputs(device), options_of(case, **made(device))
    for name in ("q", "k", "v", "dout"):
        if name in "kv" or options.cu_seqlens_q is not None:
            inputs[name] = inputs[name].clone()
            inputs[name][:, :, 40:] = math.nan
    out, lse, *gradients = assert_same_bits(inputs, options, fits=False)
    assert all(t[:, :, :37].isfinite().all() for t in (out, lse, *gradients))


def test_measured_forms_have_gradients(device: torch.device) -> None:
    """What the benchmarks' providers run: the launchers of a form behind autograd, only what is needed."""
    q, k, v, dout, _ = AttentionCase(1, 2, 2, 20, 20, 16, "top_left").inputs(device).values()
    config = config_of(VARIANTS["descriptors"])
    gradients = []
    for call in (
        lambda *tensors: _FormFunction.apply(*tensors, "top_left", config),
        lambda *tensors: fastattn.attention(*tensors, causal=True, implementation="triton"),
    ):
        q.requires_grad_(), v.requires_grad_()
        out = call(q, k, v)
        gradients.append([out, *torch.autograd.grad(out, (q, v), dout)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def _tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.zeros(4096, dtype=torch.bfloat16).as_strided(shape, strides, offset)


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (_tensor((2, 2, 4, 16), (128, 64, 16, 1)), None),
        (_tensor((1, 1, 4, 16), (3, 5, 16, 1)), None),
        (_tensor((2, 2, 4, 20), (160, 80, 20, 1)), "a stride of 40 bytes must be a positive multiple of 16"),
        (_tensor((2, 2, 4, 16), (0, 64, 16, 1)), "a stride of 0 bytes must be a positive multiple of 16"),
        (_tensor((2, 2, 4, 16), (128, 64, 16, 1), 4), "an address of 8 modulo 16 must be a multiple of it"),
        (
            _tensor((2, 2, 0, 16), (128, 64, 16, 1)),
            "a tensor of shape (2, 2, 0, 16) has no rows, and a descriptor needs one",
        ),
    ],
    ids=["dense", "ones", "odd-rows", "broadcast", "odd-base", "empty"],
)
def test_layouts_that_descriptors_read(tensor: Tensor, reason: str | None) -> None:
    assert layout_reason([tensor], AttentionOptions(1.0)) == reason


def test_the_tiles_of_dv_alone_count_as_a_form() -> None:
    plain = select_attention_config(64, torch.bfloat16, INTERPRETER)
    config = replace(plain, separate_dk_dv=True, dv=replace(plain.dk_dv, form="specialized"))
    for load, described in (("plain", False), ("light", True)):
        fitting = fitting_config(config, described, 64, torch.bfloat16, INTERPRETER, load)
        assert fitting == plain
    assert fitting_config(config, True, 64, torch.bfloat16, INTERPRETER, "plain") is config


def test_layouts_that_descriptors_cannot_read_are_right(device: torch.device) -> None:
    """Rows of 20 bytes, heads shared by a stride of 0: by pointers, with tiles for pointers."""
    case = AttentionCase(1, 4, 2, 40, 45, 10, "bottom_right", dtype=torch.bfloat16)
    inputs = case.inputs(device)
    inputs["k"] = inputs["k"][:, :1].expand(1, 2, 45, 10)
    assert_same_bits(inputs, options_of(case), fits=False)


def test_the_address_decides_anew_in_every_call(device: torch.device) -> None:
    """The plan of a layout is kept, and descriptors read it or not: aligned, 2 bytes off, and aligned again."""
    case = AttentionCase(1, 2, 1, 33, 40, 16, "bottom_right", dtype=torch.bfloat16)
    aligned = case.inputs(device)
    shifted = dict(aligned)
    for name in ("k", "v"):
        storage = torch.empty(aligned[name].numel() + 1, dtype=torch.bfloat16, device=device)
        shifted[name] = storage[1:].view(aligned[name].shape).copy_(aligned[name])
    options = options_of(case)
    expected = run(aligned, options, select_attention_config(16, torch.bfloat16, INTERPRETER))
    for inputs in (aligned, shifted, aligned):
        for one, other in zip(
            run(inputs, options, config_of(VARIANTS["descriptors"])), expected, strict=True
        ):
            assert torch.equal(one, other)


def test_specialized_warps_are_for_plain_scores() -> None:
    config = config_of(VARIANTS["specialized"])
    assert fitting_config(config, True, 16, torch.bfloat16, INTERPRETER, "plain") is config
    assert fitting_config(config, True, 16, torch.bfloat16, INTERPRETER, "plane") is not config


def test_forms_are_a_pure_function() -> None:
    """What has tiles, and the reason of what has none, which is given those of pointers."""
    assert SHIPPED_FORM == "pointers"
    bf16, f32 = torch.bfloat16, torch.float32
    for form, head_dim in product(FORMS, (1, 64, 65, 80, 96, 128, 192, 256)):
        if form == "reduction" and head_dim > 128:
            assert f"head_dim={head_dim} must be at most 128" in str(
                form_reason(head_dim, bf16, SM_90, "plain", form)
            )
            continue
        assert form_reason(head_dim, bf16, SM_90, "plain", form) is None
        config = select_attention_form(head_dim, bf16, SM_90, "plain", form)
        assert config.reduce_dq == (form == "reduction")
        assert config.forward.form == form.replace("reduction", "descriptors")
        # The compiler cannot divide what dq reads of each row.
        assert config.dq.form == (form if form in ("pointers", "warp_groups") else "descriptors")
        for tiles in (config.forward, config.dq, config.dk_dv, config.dv or config.dk_dv):
            # The compiler divides a tile over two warp groups only if the program has one.
            assert tiles.num_warps == (4 if tiles.form in FORMS[2:] else 8)
    pointers = select_attention_config(64, bf16, SM_90)
    reasons = {
        (64, bf16, KNOWN_TARGETS["sm_100"], "plain"): "tiles for sm_90 alone, not for sm_100",
        (64, bf16, KNOWN_TARGETS["gfx942"], "plain"): "tiles for sm_90 alone, not for gfx942",
        (64, f32, SM_90, "plain"): "tiles for 16-bit inputs alone, not for torch.float32",
        (320, bf16, SM_90, "plain"): "head_dim=320 must be at most",
        (64, bf16, SM_90, "heavy"): "not for a load of 'heavy'",
    }
    for kind, reason in reasons.items():
        for form in FORMS[1:]:
            assert reason in str(form_reason(*kind, form))
            assert select_attention_form(*kind, form) == select_attention_config(*kind)
    assert select_attention_form(64, bf16, SM_90, "plain", SHIPPED_FORM) == pointers
    with pytest.raises(
        ValueError,
        match="form='tma' must be one of pointers, descriptors, specialized, reduction, warp_groups",
    ):
        form_reason(64, bf16, SM_90, "plain", "tma")


REAL_SIZES = [
    AttentionCase(2, 16, 4, 1024, 1024, 64, "top_left", None, torch.bfloat16),
    AttentionCase(1, 8, 2, 777, 1999, 128, "bottom_right", None, torch.float16),
    AttentionCase(1, 4, 2, 1025, 511, 80, "bottom_right", None, torch.bfloat16),
    AttentionCase(1, 4, 1, 640, 1280, 192, False, None, torch.bfloat16),
    AttentionCase(1, 4, 4, 1000, 1000, 256, "top_left", None, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_forms_on_the_gpu(case: AttentionCase, form: str) -> None:
    device = torch.device("cuda")
    target = _target.target_of(device)
    reason = form_reason(case.head_dim, case.dtype, target, "plain", form)
    if reason is not None:
        pytest.skip(reason)
    inputs = case.inputs(device)
    config = select_attention_form(case.head_dim, case.dtype, target, "plain", form)
    first = run(inputs, options_of(case), config)
    assert_attention_accurate(case, inputs, dict(zip(RESULTS, first, strict=True)))
    for _ in range(10):
        again = run(inputs, options_of(case), config)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
