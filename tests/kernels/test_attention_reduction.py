"""dq added up by atomics beside dk: right whatever the order, and never taken by what asks for the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.kernels import attention_backward as backward_module
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import form_reason, select_attention_form
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import forced_config
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import target_of
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
from tests.attention_checks import RESULTS, AttentionCase, assert_attention_accurate
from tests.attention_options import Case, check_options

NEEDS = (True, True, True, False, False)


def config_of(form: str = "pointers", one_loop: bool = False, separate: bool = False) -> AttentionConfig:
    """Tiles of two shapes, so that dq's rows and dk's are not the same ones."""
    plain = AttentionTiles(32, 32, 1, 1)
    dk_dv = AttentionTiles(16, 32, 1, 1, form, one_loop)
    dv = AttentionTiles(32, 16, 1, 1, form) if separate else None
    return AttentionConfig(plain, plain, dk_dv, separate, plain, plain, reduce_dq=True, dv=dv)


CONFIGS = {
    "pointers": config_of(),
    "pointers-one-loop": config_of(one_loop=True),
    "descriptors": config_of("descriptors"),
    "descriptors-separate": config_of("descriptors", one_loop=True, separate=True),
}


def run(inputs: dict[str, Tensor], options: AttentionOptions, config: AttentionConfig) -> dict[str, Tensor]:
    q, k, v, dout, dlse = inputs.values()
    out, lse = attention_forward(q, k, v, *options, config=config)
    gradients = attention_backward(dout, dlse, q, k, v, out, lse, NEEDS, *options, config=config)
    return dict(zip(RESULTS, (out, lse, *gradients[:3]), strict=True))


def options_of(case: AttentionCase, **others: Any) -> AttentionOptions:
    causal = {"right": 0 if case.causal else -1, "bottom_right": case.causal == "bottom_right"}
    return AttentionOptions(1.0 / math.sqrt(case.head_dim), **causal | others)


@contextmanager
def launches_of_dq(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """A None for each launch of the kernel that computes dq alone."""
    launched: list[None] = []
    plain = backward_module.launch_dq

    def launch_dq(*arguments: Any) -> None:
        launched.append(None)
        plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(backward_module, "launch_dq", launch_dq)
        yield launched


CASES = [
    AttentionCase(2, 2, 1, 45, 40, 24, False),
    AttentionCase(1, 3, 1, 35, 45, 16, "bottom_right", dtype=torch.bfloat16),
    AttentionCase(1, 2, 2, 63, 63, 16, "top_left"),
    AttentionCase(1, 2, 1, 1, 33, 16, "bottom_right", dtype=torch.float16),
]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient(
    case: AttentionCase, config: AttentionConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = case.inputs(device)
    with launches_of_dq(monkeypatch) as launched:
        actual = run(inputs, options_of(case), config)
    assert not launched
    assert actual["dq"].dtype == case.dtype
    assert_attention_accurate(case, inputs, actual)


OPTIONS = [
    Case(1, 2, 1, 40, 70, causal="bottom_right", window=(9, 0), softcap=2.0, alibi="h"),
    Case(2, 2, 1, 37, 41, bias="hqk", mask="bk", sinks=True, v_dim=24),
    Case(1, 2, 2, 33, 40, dropout_p=0.3, lengths=True),
    # Packed rows and key lengths: by pointers whatever is asked.
    Case(3, 2, 1, 37, 41, causal="top_left", packed=True, lengths=True),
]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option(case: Case, device: torch.device) -> None:
    with forced_config(select_attention_config, config_of()):
        check_options(case, "triton", device)


def test_infinite_weights_of_keys_that_are_not_there(device: torch.device) -> None:
    """Every score is -400, and that of a key beyond the last 0: its weight, exp(400), is infinite in float32, and
    infinity times the 0 of such a key is NaN in every row of dq. Not causal, so that no other tile needs a mask.
    """
    case = AttentionCase(1, 1, 1, 33, 45, 16)
    inputs = case.inputs(device)
    inputs["q"], inputs["k"] = (
        torch.full_like(inputs[name], sign * 10.0) for name, sign in (("q", 1), ("k", -1))
    )
    for config in CONFIGS.values():
        actual = run(inputs, options_of(case), config)
        assert all(tensor.isfinite().all() for tensor in actual.values())


@pytest.mark.parametrize("packed", [False, True], ids=["heads", "sequences"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rows_of_a_neighbour_get_nothing(config: AttentionConfig, packed: bool, device: torch.device) -> None:
    """Rows beyond the last of a head or packed sequence are the next one's first: 0 is added to these, which changes
    nothing, or NaN where a key is NaN. Of 20 queries the second tile has 12 such rows. And columns beyond the last, of
    which a tile of 32 has 8, are the next row's: NaN where a query is.
    """
    case = AttentionCase(1, 2, 2, 20, 40, 24)
    inputs = case.inputs(device)
    spoiled = dict(inputs, k=inputs["k"].clone(), q=inputs["q"].clone())
    spoiled["k"][:, 0, 3] = spoiled["q"][:, 1, 17] = math.nan
    given = {}
    if packed:
        starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (20, 40)]
        given = dict(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=20, max_seqlen_k=40)
        inputs, spoiled = (
            {name: t.reshape(1, 1, -1, *t.shape[3:]) for name, t in of.items()} for of in (inputs, spoiled)
        )
    expected, found = (run(of, options_of(case, **given), config)["dq"] for of in (inputs, spoiled))
    expected, found = (dq.reshape(2, 20, 24) for dq in (expected, found))
    assert found[0].isnan().all() and found[1, 17].isnan().all()
    rows = torch.arange(20, device=device) != 17
    torch.testing.assert_close(found[1, rows], expected[1, rows])


def test_rows_that_float32_would_put_off_16_bytes(device: torch.device) -> None:
    """16-bit rows of 18, 24 apart, are a descriptor's; of as many float32 it would refuse those of 18."""
    case = AttentionCase(1, 2, 1, 20, 40, 18, dtype=torch.bfloat16)
    inputs = case.inputs(device)
    for name in ("q", "k", "v", "dout"):
        memory = torch.full((*inputs[name].shape[:3], 24), math.nan, dtype=case.dtype, device=device)
        inputs[name] = memory[..., :18].copy_(inputs[name])
    assert_attention_accurate(case, inputs, run(inputs, options_of(case), CONFIGS["descriptors"]))


def test_order_of_the_sum_is_all_that_differs(device: torch.device) -> None:
    """Keys in another order are added up in another order: no more than float32's rounding, whatever a GPU does."""
    case = AttentionCase(1, 1, 1, 20, 130, 16)
    inputs = case.inputs(device)
    shuffled = dict(inputs)
    order = torch.randperm(case.seq_k, generator=torch.Generator().manual_seed(0)).to(device)
    for name in ("k", "v"):
        shuffled[name] = inputs[name][:, :, order].contiguous()
    one, other = (run(given, options_of(case), CONFIGS["pointers"])["dq"] for given in (inputs, shuffled))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)


def _same_bits(device: torch.device) -> tuple[AttentionCase, dict[str, Tensor], dict[str, Tensor]]:
    """A case, its inputs, and its results where dq has a kernel of its own."""
    case = AttentionCase(1, 2, 1, 20, 40, 16, "bottom_right")
    inputs = case.inputs(device)
    return case, inputs, run(inputs, options_of(case), replace(CONFIGS["pointers"], reduce_dq=False))


@pytest.mark.parametrize("how", ["option", "pytorch", "pytorch-warns"])
def test_deterministic_calls_never_take_it(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs, expected = _same_bits(device)
    try:
        if how != "option":
            torch.use_deterministic_algorithms(True, warn_only=how == "pytorch-warns")
        with launches_of_dq(monkeypatch) as launched:
            actual = run(inputs, options_of(case, deterministic=how == "option"), CONFIGS["pointers"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(launched) == 1
    assert all(torch.equal(actual[name], expected[name]) for name in RESULTS)


@pytest.mark.parametrize("deterministic", [False, True])
def test_public_argument(deterministic: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a table held such a config, a call with `deterministic` would not take it."""
    case, inputs, expected = _same_bits(device)
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    with forced_config(select_attention_config, CONFIGS["pointers"]), launches_of_dq(monkeypatch) as launched:
        found = fastattn.attention(
            *tensors,
            causal=case.causal,
            deterministic=deterministic,
            return_lse=True,
            implementation="triton",
        )
        gradients = torch.autograd.grad(found, tensors, (inputs["dout"], inputs["dlse"]))
    assert len(launched) == deterministic
    for name, gradient in zip(RESULTS[2:], gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name])  # the forward of few queries rounds otherwise


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_dq_without_dk_has_its_own_kernel(
    needs: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs, expected = _same_bits(device)
    q, k, v, dout, dlse = inputs.values()
    flags = [bool(need) for need in (*needs, 0, 0)]
    with launches_of_dq(monkeypatch) as launched:
        gradients = attention_backward(
            dout,
            dlse,
            q,
            k,
            v,
            expected["out"],
            expected["lse"],
            flags,
            *options_of(case),
            config=CONFIGS["pointers"],
        )
    assert len(launched) == needs[0]
    for name, gradient, needed in zip(RESULTS[2:], gradients, flags, strict=False):
        assert torch.equal(gradient, expected[name] if needed else gradient.new_empty(0))


REAL_SIZES = [
    AttentionCase(2, 16, 4, 1024, 1024, 64, "top_left", None, torch.bfloat16),
    AttentionCase(1, 8, 2, 777, 1999, 128, "bottom_right", None, torch.float16),
    AttentionCase(1, 4, 2, 1025, 511, 80, False, None, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes_on_the_gpu(case: AttentionCase) -> None:
    """Right on every run, and dk and dv the same bits."""
    device = torch.device("cuda")
    reason = form_reason(case.head_dim, case.dtype, target_of(device), "plain", "reduction")
    if reason is not None:
        pytest.skip(reason)
    inputs = case.inputs(device)
    config = select_attention_form(case.head_dim, case.dtype, target_of(device), "plain", "reduction")
    first = run(inputs, options_of(case), config)
    assert_attention_accurate(case, inputs, first)
    for _ in range(10):
        again = run(inputs, options_of(case), config)
        assert all(torch.equal(first[name], again[name]) for name in RESULTS if name != "dq")
        assert_attention_accurate(case, inputs, again)
