"""The attention kernels with every option alone, and with all pairs of options, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from fastattn.kernels._arguments import plane_of
from fastattn.testing import make_tensor
from tests.attention_options import (
    RESULTS,
    Case,
    check_options,
    kept_weights,
    launcher_results,
    make_inputs,
)

# Two tiles of the interpreter each way, the last of them partly empty.
SMALL = Case(heads=2, kv_heads=1, seq_q=37, seq_k=41)
ALONE: dict[str, dict[str, Any]] = {
    "bottom-right-more-rows": dict(causal="bottom_right", seq_q=70, seq_k=33),
    "window": dict(window=(7, 3)),
    "window-left": dict(window=(9, -1), seq_q=100, batch=1),
    "window-right": dict(window=(-1, 4), batch=1),
    "window-own-key": dict(window=(0, 0)),
    "window-past-the-keys": dict(window=(2, -1), causal="top_left", seq_q=90, seq_k=33),
    "window-bottom-right": dict(window=(5, -1), causal="bottom_right", seq_q=90, seq_k=70, batch=1),
    "softcap": dict(softcap=1.5),
    "softcap-small": dict(softcap=0.01),
    "alibi": dict(alibi="h"),
    "alibi-of-batch": dict(alibi="bh", seq_q=70, seq_k=31),
    "sinks": dict(sinks=True),
    "sinks-of-masked-rows": dict(sinks=True, causal="bottom_right", seq_q=70, seq_k=33),
    "lengths": dict(lengths=True, batch=4),
    "dropout": dict(dropout_p=0.3),
    "dropout-all": dict(dropout_p=1.0),
    "packed": dict(packed=True, batch=4),
    "packed-causal": dict(packed=True, batch=5, causal="bottom_right"),
    "v-wider": dict(head_dim=16, v_dim=40),
    "v-narrower": dict(head_dim=40, v_dim=16),
    **{f"bias-{dims or 'scalar'}": dict(bias=dims) for dims in ("", "h", "q", "bk", "hq", "hqk", "bhqk")},
    **{f"mask-{dims}": dict(mask=dims) for dims in ("k", "bq", "bqk", "hqk", "bhqk")},
}


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_each_option(given: dict[str, Any], device: torch.device) -> None:
    check_options(replace(SMALL, **given), "triton", device)


# What one option may be; the first is its absence.
CHOICES: dict[str, tuple[Any, ...]] = {
    "causal": (False, "top_left", "bottom_right"),
    "window": (None, (5, -1), (3, 20)),
    "softcap": (0.0, 2.0),
    "bias": (None, "hqk", "bk", "bhqk"),
    "mask": (None, "bk", "hqk"),
    "alibi": (None, "h", "bh"),
    "sinks": (False, True),
    "lengths": (False, True),
    "dropout_p": (0.0, 0.4),
    "packed": (False, True),
    "v_dim": (16, 24),
    "kv_heads": (1, 2),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "seq_q": (37, 65),
}


def covering_cases() -> list[Case]:
    """Few cases in which every two choices of different options occur together, found greedily."""
    names = list(CHOICES)
    missing = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x in range(len(CHOICES[a]))
        for y in range(len(CHOICES[b]))
    }
    found = []
    while missing:
        chosen: dict[str, int] = {}
        a, x, b, y = min(missing)
        chosen |= {a: x, b: y}
        for name in names:
            if name not in chosen:
                gains = [_gain(missing, chosen, name, place) for place in range(len(CHOICES[name]))]
                chosen[name] = gains.index(max(gains))
        missing -= {(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)}
        found.append(replace(SMALL, **{name: CHOICES[name][place] for name, place in chosen.items()}))
    return found


def _gain(missing: set[tuple[str, int, str, int]], chosen: dict[str, int], name: str, place: int) -> int:
    """How many missing pairs a choice completes."""
    pairs = ((other, at, name, place) for other, at in chosen.items())
    return sum(pair in missing or (*pair[2:], *pair[:2]) in missing for pair in pairs)


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_pairs_of_options(case: Case, device: torch.device) -> None:
    check_options(case, "triton", device)


def test_every_pair_of_choices_is_there() -> None:
    cases = covering_cases()
    assert len(cases) < 30
    for a, b in combinations(CHOICES, 2):
        for x in CHOICES[a]:
            for y in CHOICES[b]:
                assert any(getattr(case, a) == x and getattr(case, b) == y for case in cases), (a, x, b, y)


EVERYTHING = replace(
    SMALL,
    batch=3,
    window=(30, 5),  # with lengths of 5 to 19 keys, most rows still see some
    softcap=2.0,
    bias="hqk",
    mask="bk",
    alibi="h",
    sinks=True,
    lengths=True,
    dropout_p=0.4,
)


@pytest.mark.parametrize("packed", [False, True])
def test_everything_at_once(packed: bool, device: torch.device) -> None:
    """Every option in one call, with grouped heads and values of another width."""
    causal = "bottom_right" if packed else False
    case = replace(EVERYTHING, batch=2, seq_q=29, seq_k=33, packed=packed, causal=causal, v_dim=24)
    check_options(case, "triton", device)


PLANES = ["".join(dims) for count in range(5) for dims in combinations("bhqk", count)]


@pytest.mark.parametrize("dims", PLANES, ids=lambda dims: dims or "scalar")
def test_bias_and_mask_of_every_shape(dims: str, device: torch.device) -> None:
    """The 16 ways to broadcast, the bias's gradient reduced to its shape; the mask has what the bias has not."""
    others = "".join(d for d in "bhqk" if d not in dims)
    check_options(replace(SMALL, seq_q=5, seq_k=11, bias=dims, mask=others), "triton", device)


@pytest.mark.parametrize("packed", [False, True])
def test_runs_are_equal_bit_for_bit_and_inputs_untouched(packed: bool, device: torch.device) -> None:
    case = replace(EVERYTHING, packed=packed)
    inputs = make_inputs(case, device)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    first, second = (launcher_results(case, inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)
    assert all(torch.equal(inputs[name].nan_to_num(7.0), kept[name].nan_to_num(7.0)) for name in inputs)


@pytest.mark.parametrize("needed", range(5))
def test_only_needed_gradients_are_computed(needed: int, device: torch.device) -> None:
    case = replace(EVERYTHING, dropout_p=0.0, batch=1)
    inputs = make_inputs(case, device)
    every = launcher_results(case, inputs, "triton")
    found = launcher_results(case, inputs, "triton", tuple(place == needed for place in range(5)))
    for place, name in enumerate(RESULTS[2:]):
        assert torch.equal(found[name], every[name] if place == needed else every[name].new_empty(0))


def test_every_element_of_the_results_is_written(device: torch.device) -> None:
    """Deterministic mode fills fresh memory with NaN, so an element that no program writes shows."""
    case = replace(EVERYTHING, dropout_p=0.0, packed=True)
    inputs = make_inputs(case, device)
    expected = launcher_results(case, inputs, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        found = launcher_results(case, inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], expected[name]) for name in RESULTS)


def test_offsets_out_of_range_stay_within_the_tensors(device: torch.device) -> None:
    """Rows beyond the tensors would be NaN here: they lie between two tensors of one buffer."""
    case = replace(SMALL, packed=True, batch=3, heads=1, kv_heads=1)
    inputs = make_inputs(case, device)
    total = inputs["q"].size(2)
    for name in ("q", "k", "v", "dout"):
        tensor = inputs[name]
        memory = tensor.new_full((3, *tensor.shape[1:]), float("nan"))
        memory[1:2] = tensor
        inputs[name] = memory[1:2]
    for starts in ((-5, 10, total + 50, total + 90), (5, 2, 30, 20)):
        bad = torch.tensor(starts, dtype=torch.int32, device=device)
        found = launcher_results(case, inputs | {"cu_seqlens_q": bad, "cu_seqlens_k": bad}, "triton")
        assert all(found[name].isfinite().all() for name in RESULTS if name != "lse")


def test_sequences_longer_than_said_stay_within_the_bias(device: torch.device) -> None:
    """A bias is as large as the longest sequence is said to be; NaN lies behind it."""
    case = replace(SMALL, packed=True, batch=1, heads=1, kv_heads=1, seq_q=40, seq_k=40, bias="qk", mask="qk")
    inputs = make_inputs(case, device)
    rows = inputs["q"].size(2)
    bias = torch.full((3, 1, 8, 8), float("nan"), device=device)
    bias[1] = 0.0
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool, device=device)
    mask[1] = True
    starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
    short = replace(case, seq_q=8, seq_k=8)
    given = inputs | {"bias": bias[1:2], "mask": mask[1:2], "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    found = launcher_results(short, given, "triton")
    assert all(found[name].isfinite().all() for name in RESULTS if name != "lse")
    assert found["out"][:, :, :8].any() and not found["out"][:, :, 8:].any()
    assert found["dk"][:, :, :8].any() and not found["dk"][:, :, 8:].any()


def test_sinks_of_any_stride(device: torch.device) -> None:
    """The kernel reads them side by side."""
    case = replace(SMALL, sinks=True)
    inputs = make_inputs(case, device)
    strided = make_tensor(case.heads, device=device, strides=(3,))
    strided.copy_(inputs["sinks"])
    first, second = (
        launcher_results(case, inputs | {"sinks": s}, "triton") for s in (inputs["sinks"], strided)
    )
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


@pytest.mark.parametrize("bias", ["hqk", "bhqk"])
def test_bias_of_any_strides(bias: str, device: torch.device) -> None:
    """T5's bias is (1, heads, q, k) with the heads innermost; gaps hold NaN."""
    case = replace(SMALL, bias=bias)
    inputs = make_inputs(case, device)
    expected = launcher_results(case, inputs, "triton")
    batch, heads, rows, keys = inputs["bias"].shape
    strides = (rows * keys * (heads + 1), 1, keys * (heads + 1), heads + 1)
    turned = make_tensor(batch, heads, rows, keys, device=device, strides=strides)
    turned.copy_(inputs["bias"])
    found = launcher_results(case, inputs | {"bias": turned}, "triton")
    assert all(torch.equal(found[name], expected[name]) for name in RESULTS)


def test_expanded_planes_are_read_in_place(device: torch.device) -> None:
    """A mask that is expanded, or has a size of 1, has a stride of 0; None within a head, where one row is loaded."""
    mask = torch.ones(1, 1, 37, 41, dtype=torch.uint8, device=device)
    assert plane_of(mask.expand(2, 4, 37, 41))[1:] == (0, 0, 41, 1, 41, 3)
    assert plane_of(mask[:, :, :1])[1:] == (0, 0, 0, 1, 41, 2)
    case = replace(SMALL, mask="qk")
    inputs = make_inputs(case, device)
    expanded = inputs | {"mask": inputs["mask"].expand(2, 2, 37, 41)}
    first, second = (launcher_results(case, given, "triton") for given in (inputs, expanded))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


def test_dropout_is_of_the_seed_the_place_and_nothing_else(device: torch.device) -> None:
    """The same weights are kept whatever the tiles; about 1 - p of them; others for another seed, offset or head."""
    case = replace(SMALL, dropout_p=0.3, seq_q=64, seq_k=96)
    inputs = make_inputs(case, device)
    kept = kept_weights(case, inputs, "triton")
    share = kept.float().mean().item()
    # Four standard deviations of the mean of 2 x 2 x 64 x 96 draws.
    assert abs(share - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])
    short = replace(case, seq_q=40, seq_k=50)
    assert torch.equal(kept_weights(short, make_inputs(short, device), "triton"), kept[:, :, :40, :50])
    for place in range(2):
        other = dict(inputs, dropout_seed=inputs["dropout_seed"].clone())
        other["dropout_seed"][place] += 1
        assert not torch.equal(kept, kept_weights(case, other, "triton"))


REAL_SIZES = [
    Case(2, 16, 4, 1024, 1024, 64, 64, torch.bfloat16, "top_left", (200, -1), sinks=True),
    Case(2, 8, 8, 777, 1999, 128, 128, torch.bfloat16, "bottom_right", softcap=30.0),
    Case(2, 8, 8, 512, 512, 64, 64, torch.bfloat16, bias="hqk", mask="bk", dropout_p=0.1),
    Case(3, 4, 2, 333, 500, 80, 80, torch.float16, alibi="h", lengths=True),
    Case(1, 4, 2, 500, 700, 192, 128, torch.bfloat16, "bottom_right"),
    Case(6, 4, 2, 700, 900, 128, 128, torch.bfloat16, "bottom_right", packed=True, window=(100, -1)),
    Case(2, 2, 1, 300, 200, 256, 256, torch.bfloat16, bias="bhqk", mask="bhqk"),
    Case(
        2,
        4,
        2,
        300,
        200,
        64,
        256,
        torch.float32,
        bias="bk",
        alibi="bh",
        sinks=True,
        lengths=True,
        softcap=5.0,
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    check_options(case, "triton", torch.device("cuda"))


@pytest.mark.gpu
def test_repeats_are_equal_bit_for_bit_on_the_gpu() -> None:
    case = replace(REAL_SIZES[2], seq_q=1500, seq_k=1500, sinks=True)
    inputs = make_inputs(case, torch.device("cuda"))
    first = launcher_results(case, inputs, "triton")
    for _ in range(20):
        again = launcher_results(case, inputs, "triton")
        assert all(torch.equal(first[name], again[name]) for name in RESULTS)
