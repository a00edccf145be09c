"""Attention in blocks of PyTorch operators: every option, alone and together, forward and backward."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.kernels._options import AttentionOptions
from fastattn.ops import _attention_blocks
from fastattn.ops.attention_blockwise import attention_blockwise_backward, attention_blockwise_forward
from tests.attention_options import (
    RESULTS,
    Case,
    check_options,
    kept_weights,
    launcher_results,
    make_inputs,
    make_options,
)

BROADCASTS = ["", "b", "h", "q", "k", "bh", "qk", "bk", "hq", "bqk", "hqk", "bhqk"]
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-left": dict(causal="top_left"),
    "bottom-right": dict(causal="bottom_right"),
    "bottom-right-more-rows": dict(causal="bottom_right", seq_q=80, seq_k=33),
    "causal": dict(causal=True, seq_q=63, seq_k=63),
    "window": dict(window=(7, 3)),
    "window-left": dict(window=(9, -1)),
    "window-right": dict(window=(-1, 4)),
    "window-own-key": dict(window=(0, 0)),
    "window-top-left": dict(window=(5, -1), causal="top_left", seq_q=90),
    "window-bottom-right": dict(window=(5, -1), causal="bottom_right", seq_q=90),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi="h"),
    "alibi-of-batch": dict(alibi="bh", seq_q=70, seq_k=31),
    "sinks": dict(sinks=True),
    "sinks-of-masked-rows": dict(sinks=True, causal="bottom_right", seq_q=80, seq_k=33),
    "lengths": dict(lengths=True, batch=4),
    "dropout": dict(dropout_p=0.3),
    "dropout-all": dict(dropout_p=1.0),
    "packed": dict(packed=True, batch=4),
    "packed-causal": dict(packed=True, batch=5, causal="bottom_right"),
    "v-dim": dict(v_dim=24),
    "one-group": dict(heads=4, kv_heads=4),
    "negative-scale": dict(scale=-0.5, causal="top_left"),
    **{f"bias-{dims or 'scalar'}": dict(bias=dims) for dims in BROADCASTS},
    **{f"mask-{dims or 'scalar'}": dict(mask=dims) for dims in BROADCASTS},
}
EMPTY: dict[str, dict[str, Any]] = {
    "rows": dict(seq_q=0),
    "keys": dict(seq_k=0),
    "batch": dict(batch=0),
    "heads": dict(heads=0),
    "head-dim": dict(head_dim=0),
    "v-dim": dict(v_dim=0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=[False, True], ids=["one-block", "blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs in one block, and as long ones are: in several pieces and blocks."""
    if request.param:
        monkeypatch.setattr(_attention_blocks, "_BLOCK_ELEMENTS_CPU", 1 << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_each_option(given: dict[str, Any], dtype: torch.dtype, block_size: None) -> None:
    check_options(replace(Case(), dtype=dtype, **given), "blockwise")


def random_case(seed: int) -> Case:
    """Each option is there in half of the cases, odd sizes in all."""
    r = random.Random(seed)
    heads, kv_heads = r.choice([(1, 1), (4, 2), (3, 3), (6, 2)])
    seq_q, seq_k = r.choice([(1, 63), (31, 127), (63, 63), (65, 17), (50, 1), (127, 90)])
    causal = r.choice([False, False, "top_left", "bottom_right"])

    def maybe(value: Any, otherwise: Any = None) -> Any:
        return value if r.random() < 0.5 else otherwise

    return Case(
        batch=r.choice([1, 2, 5]),
        heads=heads,
        kv_heads=kv_heads,
        seq_q=seq_q,
        seq_k=seq_k,
        v_dim=r.choice([16, 16, 8]),
        dtype=r.choice(DTYPES),
        causal=causal,
        window=maybe((r.choice([-1, 0, 5, 40]), -1 if causal else r.choice([-1, 0, 3, 30]))),
        softcap=maybe(2.0, 0.0),
        bias=maybe(r.choice(BROADCASTS)),
        mask=maybe(r.choice(BROADCASTS)),
        alibi=maybe(r.choice(["h", "bh"])),
        sinks=maybe(True, False),
        lengths=maybe(True, False),
        dropout_p=maybe(0.4, 0.0),
        packed=maybe(True, False),
    )


@pytest.mark.parametrize("case", [random_case(seed) for seed in range(150)], ids=str)
def test_options_together(case: Case, block_size: None) -> None:
    check_options(case, "blockwise")


@pytest.mark.parametrize("packed", [False, True])
def test_everything_at_once(packed: bool, block_size: None) -> None:
    """Every option in one call, with grouped heads and values of another width."""
    options = dict(softcap=2.0, bias="hqk", mask="bk", alibi="h", sinks=True, lengths=True, dropout_p=0.4)
    check_options(Case(batch=3, window=(60, 5), v_dim=24, packed=packed, **options), "blockwise")


@pytest.mark.parametrize("given", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_sizes(given: dict[str, Any], sinks: bool) -> None:
    """Nothing to read gives zeros of the right shape, and lse is the sink's own score or -inf."""
    case = replace(Case(), sinks=sinks, bias="bhqk", **given)
    inputs = make_inputs(case)
    found = launcher_results(case, inputs, "blockwise")
    for name, like in zip(RESULTS[2:], ("q", "k", "v", "bias", "sinks"), strict=True):
        assert found[name].shape == (inputs[like].shape if like in inputs else (0,))
        assert found[name].isfinite().all()
    if case.seq_k == 0:
        expected = inputs["sinks"][:, None] if sinks else torch.tensor(-math.inf)
        assert torch.equal(found["lse"], expected.expand(found["lse"].shape))
        assert not found["out"].any()
    if case.head_dim == 0 or case.v_dim == 0:
        check_options(case, "blockwise")


@pytest.mark.parametrize("needed", range(5))
def test_only_what_is_needed(needed: int) -> None:
    """One gradient alone is the same, to the bit, as with the others; the rest are empty."""
    case = Case(bias="hk", sinks=True, softcap=1.5, dropout_p=0.2, causal="bottom_right")
    inputs = make_inputs(case)
    together = launcher_results(case, inputs, "blockwise")
    alone = launcher_results(case, inputs, "blockwise", tuple(n == needed for n in range(5)))
    for n, name in enumerate(RESULTS[2:]):
        if n == needed:
            assert torch.equal(alone[name], together[name])
        else:
            assert alone[name].shape == (0,)


def test_without_dlse() -> None:
    case = Case(sinks=True)
    inputs = make_inputs(case)
    inputs["dlse"].zero_()
    expected = launcher_results(case, inputs, "blockwise")
    options = make_options(case, inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gradients = attention_blockwise_backward(
        inputs["dout"], None, q, k, v, expected["out"], expected["lse"], [True] * 3 + [False, True], *options
    )
    for name, gradient in zip(RESULTS[2:], gradients, strict=True):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """Strided and expanded inputs give what contiguous ones give; out has the order of q's dimensions."""
    case = Case(dtype=dtype, bias="bhqk", mask="bhqk")
    inputs = make_inputs(case)
    inputs["bias"], inputs["mask"] = inputs["bias"][:, :1, :, :1], inputs["mask"][:1, :, :1]
    expected = launcher_results(case, inputs, "blockwise")
    strided = {
        n: t.transpose(1, 2).contiguous().transpose(1, 2) if n in RESULTS_OF_Q else t
        for n, t in inputs.items()
    }
    strided["bias"] = inputs["bias"].expand(case.shape("bhqk"))
    strided["mask"] = inputs["mask"].expand(case.shape("bhqk"))
    found = launcher_results(case, strided, "blockwise")
    assert found["out"].stride() == found["dq"].stride() == strided["q"].stride()
    assert found["dbias"].shape == strided["bias"].shape
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(found[name], expected[name])


RESULTS_OF_Q = ("q", "k", "v", "dout")


def test_autocast_leaves_the_products_wide() -> None:
    case = Case(softcap=2.0)
    inputs = make_inputs(case)
    expected = launcher_results(case, inputs, "blockwise")
    with torch.autocast("cpu", torch.bfloat16):
        found = launcher_results(case, inputs, "blockwise")
    for name in RESULTS:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("offsets", [[0, 4, 9], [2, 3, 9], [-5, 4, 1 << 30], [0, 7, 3], [6], [9, 9, 0]])
def test_wrong_offsets_read_nothing_outside(offsets: list[int]) -> None:
    """Offsets are clamped into the tensor and made to rise; rows of no sequence are as if fully masked."""
    case = Case(batch=1)
    inputs = make_inputs(replace(case, seq_q=9, seq_k=9))
    inputs["cu_seqlens_q"] = inputs["cu_seqlens_k"] = torch.tensor(offsets, dtype=torch.int32)
    found = launcher_results(case, inputs, "blockwise")
    rising = [max(0, min(9, max(offsets[: n + 1]))) for n in range(len(offsets))]
    inside = torch.zeros(9, dtype=torch.bool)
    inside[rising[0] : rising[-1]] = True
    assert torch.equal(found["lse"].isfinite(), inside.expand(1, case.heads, 9))
    for name in ("out", "dq", "dk", "dv"):
        assert found[name].isfinite().all()
        assert not found[name][:, :, ~inside].any()


def test_dropout_is_drawn_from_seed_and_shape_alone(block_size: None) -> None:
    case = Case(dropout_p=0.3, seq_q=100, seq_k=200)
    inputs = make_inputs(case)
    kept = kept_weights(case, inputs, "blockwise")
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    otherwise = replace(case, head_dim=8, dtype=torch.float64)
    assert torch.equal(kept, kept_weights(otherwise, make_inputs(otherwise), "blockwise"))
    other = {**inputs, "dropout_seed": inputs["dropout_seed"] + torch.tensor([0, 1])}
    assert not torch.equal(kept, kept_weights(case, other, "blockwise"))
    # No two heads and no two batches share their draw.
    assert len({tuple(row.tolist()) for row in kept.flatten(0, 2)}) == kept.flatten(0, 2).size(0)


def test_dropout_keeps_the_same_weights_under_a_window(block_size: None) -> None:
    """The blocks of a window would be longer; with dropout they are not."""
    case = Case(dropout_p=0.5, seq_q=130, seq_k=130, v_dim=130)
    inputs = make_inputs(case)
    inputs["v"] = torch.eye(130).expand(2, 2, -1, -1)
    inputs["q"].zero_()
    kept = kept_weights(case, inputs, "blockwise")
    options = make_options(replace(case, window=(3, 2)), inputs)
    out, _ = attention_blockwise_forward(inputs["q"], inputs["k"], inputs["v"], *options)
    places = torch.arange(130)
    seen = ((places - places[:, None]) >= -3) & ((places - places[:, None]) <= 2)
    assert torch.equal(out > 0, kept & seen)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8192), (1, 1, 8192, 1)])
def test_memory_is_linear(shape: tuple[int, ...]) -> None:
    """8,192 x 8,192 scores would take 256 MiB in float32; blocks of 1 MiB exist, a few at a time."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v, dout = (torch.randn(1, 1, 8192, 16) for _ in range(4))
    bias = torch.randn(shape)
    options = AttentionOptions(0.25, left=5000, right=0, bottom_right=True, softcap=20.0, bias=bias)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out, lse = attention_blockwise_forward(q, k, v, *options)
        attention_blockwise_backward(dout, None, q, k, v, out, lse, [True] * 4 + [False], *options)
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) <= 4 * 2**20
    held, most = 0, 0
    for size in sizes:
        held += size
        most = max(most, held)
    assert most <= 32 * 2**20


def test_a_window_skips_the_keys_outside() -> None:
    """NaN in values that no row's window reaches shows that they take part in no product."""
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 512, 8)
    v = torch.full((1, 1, 512, 8), math.nan)
    v[:, :, 500:] = 1.0
    options = AttentionOptions(0.5, left=8, right=0, bottom_right=True)
    out, _ = attention_blockwise_forward(q, k, v, *options)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_options_in_other_dtypes() -> None:
    """A bias in float32 beside 16-bit inputs is not rounded, and each gradient has its own tensor's dtype."""
    case = Case(dtype=torch.bfloat16, bias="hqk", sinks=True)
    inputs = make_inputs(case)
    expected = launcher_results(case, inputs, "blockwise")
    wide = {**inputs, "bias": inputs["bias"].float(), "sinks": inputs["sinks"].double()}
    found = launcher_results(case, wide, "blockwise")
    assert found["dbias"].dtype == torch.float32 and found["dsinks"].dtype == torch.float64
    for name in RESULTS:
        torch.testing.assert_close(found[name].to(expected[name].dtype), expected[name])
    wide["bias"] = wide["bias"] + 2.0**-10
    assert not torch.equal(launcher_results(case, wide, "blockwise")["dbias"], found["dbias"])


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    case = Case(causal="bottom_right", seq_q=80, seq_k=33)
    expected = launcher_results(case, make_inputs(case), "blockwise")
    inputs = make_inputs(replace(case, sinks=True))
    inputs["sinks"].fill_(-math.inf)
    found = launcher_results(case, inputs, "blockwise")
    assert not found["dsinks"].any()
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(found[name], expected[name])
