"""The norm launchers: every form of the kernels at small odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn import reference
from fastattn.kernels._norm_config import select_norm_backward_config, select_norm_forward_config
from fastattn.kernels._plan import row_distance
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.kernels.norm_forward import norm_forward
from fastattn.testing import make_tensor
from tests.norm_checks import (
    EPS,
    FORMS,
    Case,
    backward,
    check,
    check_statistics,
    forward,
    kept_elements,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


WIDTHS = [Case(width=width) for width in (1, 3, 63, 127)]
WIDE = [Case(rows=3, width=768), Case(rows=2, width=1000, dtype="fp16", parameters="fp32")]
ROWS = [Case(rows=rows, width=17) for rows in (1, 40)]
PRECISIONS = [Case(dtype=dtype, width=127) for dtype in ("bf16", "fp16")]
MIXED = [
    Case(dtype=dtype, parameters=parameters, width=33)
    for dtype, parameters in (("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"))
]
PARTIAL = [
    Case(width=33, has_weight=has_weight, has_bias=has_bias)
    for has_weight, has_bias in ((False, True), (True, False), (False, False))
]
OPTIONS = [
    Case(rms=True),
    Case(rms=True, width=1, has_weight=False),
    Case(rms=True, dtype="bf16", parameters="fp32", zero_centered=True),
    Case(zero_centered=True, dtype="bf16", out="fp32"),
    Case(dtype="fp32", out="fp16"),
    Case(from_output=True),
    Case(from_output=True, has_weight=False, zero_centered=True),
    Case(from_output=True, rms=True, zero_centered=True, dtype="bf16", parameters="fp32"),
    Case(from_output=True, has_bias=False, dtype="bf16"),
]
SUMS = [
    Case(adds=True),
    Case(adds=True, rms=True, dtype="bf16"),
    Case(adds=True, dtype="bf16", residual="fp32", parameters="fp32"),
    Case(adds=True, dtype="bf16", residual="fp32", rms=True, dropout_p=0.3),
    Case(adds=True, has_residual=False, dropout_p=0.5, width=127),
    Case(adds=True, rowscale=True, width=3),
    Case(adds=True, rowscale=True, dropout_p=0.1, has_weight=False, has_bias=False),
    Case(adds=True, dropout_p=0.5, from_output=True),
    Case(adds=True, dtype="fp32", residual="bf16", out="bf16", rowscale=True),
    Case(adds=True, width=1, rms=True, dropout_p=1.0),
]


# The interpreter takes 0.2 to 2 seconds a case: the wide ones in the form that is selected, the others in one that has
# several of all tiles, and a few in every form.
CALLS = [("selected", case) for case in [*WIDE, *WIDTHS, SUMS[2], SUMS[6]]]
CALLS += [("tiles", c) for c in [*WIDTHS[2:], *ROWS, *PRECISIONS, *MIXED, *PARTIAL, *OPTIONS, *SUMS]]
CALLS += [("one-row", case) for case in [WIDTHS[2], MIXED[0], OPTIONS[7], SUMS[3]]]


@pytest.mark.parametrize("form, case", CALLS, ids=str)
def test_matches_reference(case: Case, form: str, device: torch.device) -> None:
    check(case, case.tensors(device), FORMS[form])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("width", [3, 200])
def test_shipped_configs_match_reference(width: int, target: str, device: torch.device) -> None:
    """The tiles that GPUs run, of up to 64 rows, with a number of rows that fills none of them."""
    known, dtype = KNOWN_TARGETS[target], torch.float32
    alignment = math.gcd(width, 16)
    case = Case(rows=9, width=width, adds=True, dropout_p=0.2)
    config = select_norm_backward_config(width, alignment, [dtype] * 3, True, known)
    check(
        case, case.tensors(device), (select_norm_forward_config(width, alignment, dtype, True, known), config)
    )


@pytest.mark.parametrize("form", ["selected", "tiles"])
def test_rows_at_a_distance(form: str, device: torch.device) -> None:
    """Gaps between the rows hold NaN."""
    case = Case(rows=6, width=37, adds=True)
    given = case.tensors(device)
    for seed, (name, stride) in enumerate(dict(x=50, residual=39, dy=41, dresidual_out=43).items()):
        given[name] = make_tensor(6, 37, strides=(stride, 1), device=device, seed=seed)
    check(case, given, FORMS[form])


@pytest.mark.parametrize(
    "shape, strides, copied",
    [
        ((6, 8), (8, 1), False),
        ((6, 8), (11, 1), False),
        ((6, 8), (0, 1), False),
        ((2, 3, 8), (33, 11, 1), False),
        ((2, 3, 4, 2), (33, 11, 2, 1), False),
        ((6, 1), (5, 9), False),
        ((6, 8), (1, 6), True),
        ((2, 3, 8), (8, 16, 1), True),
    ],
    ids=str,
)
def test_rows_at_equal_distances_are_not_copied(
    shape: tuple[int, ...], strides: tuple[int, ...], copied: bool, device: torch.device
) -> None:
    dims = 2 if len(shape) == 4 else 1
    x = torch.arange(100.0, device=device).as_strided(shape, strides)
    distance = row_distance(shape, strides, dims)
    assert (distance is None) == copied
    if distance is not None:
        rows = x.reshape(6, -1)
        assert torch.equal(x.as_strided(rows.shape, (distance, 1)), rows)


@pytest.mark.parametrize("form", ["tiles"])
@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0), (1, 5)], ids=str)
def test_gradients_of_any_strides(strides: tuple[int, int], form: str, device: torch.device) -> None:
    """Expanded gradients, such as that of a sum, and transposed ones."""
    case = Case(rows=5, width=37)
    given = case.tensors(device)
    given["dy"] = make_tensor(5 * 37, device=device, seed=1).as_strided((5, 37), strides)
    check(case, given, FORMS[form])


def test_transposed_and_higher_rank_inputs(device: torch.device) -> None:
    """Normalizes over two dimensions of a transposed four-dimensional x, and over rows that are no matrix."""

    def run(x: torch.Tensor, weight: torch.Tensor | None, dims: int) -> tuple[torch.Tensor, ...]:
        return norm_forward(
            x, None, weight, None, None, None, dims, EPS, True, False, 0.0, None, torch.float32
        )

    x = make_tensor(3, 5, 2, 4, device=device).permute(2, 3, 1, 0)
    weight = make_tensor(5, 3, device=device, seed=2)
    y, _, mean, rstd = run(x, weight, 2)
    assert y.is_contiguous() and mean.shape == rstd.shape == (2, 4)
    truth = reference.layer_norm(x.double(), (5, 3), weight.double(), None, EPS)
    torch.testing.assert_close(y, truth.float())
    x = make_tensor(2, 5, 3, 16, device=device).transpose(1, 2)
    torch.testing.assert_close(
        run(x, None, 1)[0], reference.layer_norm(x.double(), 16, None, None, EPS).float()
    )


@pytest.mark.parametrize("form", ["selected", "tiles"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_rows(value: float, form: str, device: torch.device) -> None:
    """The variance is zero: y is the bias, however far from zero the rows are, and dx is finite."""
    case = Case(rows=3)
    given = case.tensors(device) | {"x": torch.full((3, 63), value, device=device)}
    found = forward(case, given, FORMS[form][0])
    torch.testing.assert_close(found[0], given["bias"].expand(3, -1), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(found[3], torch.full((3,), EPS**-0.5, device=device))
    assert all(
        gradient.isfinite().all() for gradient in backward(case, given, found, FORMS[form][1]).values()
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [63, 400])
def test_large_mean_and_small_variance(width: int, form: str, device: torch.device) -> None:
    """Mean 1e4, standard deviation 0.1: the mean of squares less the square of the mean has no digit left,
    and a mean rounded to float32 is off by up to 5e-4, which is 0.5 % of the deviation.
    """
    case = Case(rows=4, width=width, has_weight=False, has_bias=False)
    x = 1e4 + 0.1 * make_tensor(4, width, device=device)
    y, _, mean, rstd = forward(case, {"x": x}, FORMS[form][0])
    truth = reference.layer_norm(x.double(), width, None, None, EPS)
    assert (y - truth).abs().max() < 1e-5
    check_statistics(case, x, mean, rstd)


@pytest.mark.parametrize("form", ["tiles"])
def test_column_tiles_of_very_different_means(form: str, device: torch.device) -> None:
    """The first tile's mean is 0 and the others' 1e3: what is subtracted from them is then no help."""
    case = Case(rows=3, width=100, has_weight=False, has_bias=False)
    given = case.tensors(device)
    given["x"][:, 32:] += 1e3
    check(case, given, FORMS[form])


EVERYTHING = Case(rows=9, width=35, adds=True, dropout_p=0.4, rowscale=True)


@pytest.mark.parametrize("form", ["tiles"])
def test_two_runs_give_the_same_bits(form: str, device: torch.device) -> None:
    given = EVERYTHING.tensors(device)
    runs = []
    for _ in range(2):
        found = forward(EVERYTHING, given, FORMS[form][0])
        runs.append((*found, *backward(EVERYTHING, given, found, FORMS[form][1]).values()))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("form", ["tiles"])
@pytest.mark.parametrize("asked", ["r", "x", "w", "b", "rw", "xb", "wb", ""])
def test_gradients_asked_for(asked: str, form: str, device: torch.device) -> None:
    """What is asked for has the same bits as among all; what is not asked for is empty."""
    given = EVERYTHING.tensors(device)
    found = forward(EVERYTHING, given)
    everything = backward(EVERYTHING, given, found, FORMS[form][1])
    results = backward(EVERYTHING, given, found, FORMS[form][1], asked)
    for name, gradient in results.items():
        assert torch.equal(gradient, everything[name]) if name in asked else gradient.shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_does_not_depend_on_tiles(form: str, device: torch.device) -> None:
    given = EVERYTHING.tensors(device)
    _, summed, _, _ = forward(EVERYTHING, given, FORMS[form][0])
    assert torch.equal(summed, forward(EVERYTHING, given)[1])


def test_dropout_keeps_its_share_of_every_column_and_row(device: torch.device) -> None:
    """Also of each of the four numbers that a draw gives, and independent of the number next to it."""
    case = Case(rows=64, width=256, adds=True, dropout_p=0.3)
    given = case.tensors(device)
    kept = kept_elements(case, given)
    assert kept is not None
    kept = kept.double()
    assert abs(kept.mean().item() - 0.7) < 0.02
    for quarter in range(4):
        assert abs(kept[:, quarter::4].mean().item() - 0.7) < 0.03
    assert (kept.mean(0) - 0.7).abs().max() < 0.3 and (kept.mean(1) - 0.7).abs().max() < 0.15
    centred = kept - kept.mean()
    for shift in (1, 2, 3, 4):
        correlation = (centred[:, shift:] * centred[:, :-shift]).mean() / centred.square().mean()
        assert abs(correlation.item()) < 0.05
    below = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(below.item()) < 0.05
    other = kept_elements(case, given | {"seed": given["seed"] + 1})
    assert other is not None and (other.double() != kept).double().mean() > 0.3


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_zero_scale_gives_nan_where_the_output_is_kept(zero_centered: bool, device: torch.device) -> None:
    """Of x_hat behind a zero weight nothing is left in y; a bias beyond y's precision must not make it infinite."""
    case = Case(8, from_output=True, dtype="bf16", parameters="fp32", zero_centered=zero_centered)
    given = case.tensors(device)
    given["weight"][5] = -1.0 if zero_centered else 0.0
    given["dy"].abs_()  # or infinities of both signs would add up to NaN, as they would with rows outside
    found = backward(case, given, forward(case, given))
    assert found["w"].isnan().nonzero().flatten().tolist() == [5]
    assert found["r"].isnan().all() and found["b"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: torch.device) -> None:
    case = Case(*shape, adds=True, parameters="bf16")
    given = case.tensors(device)
    found = forward(case, given)
    y, summed, mean, rstd = found
    assert y.shape == summed.shape == shape and mean.shape == rstd.shape == shape[:1]
    results = backward(case, given, found)
    assert results["r"].shape == results["x"].shape == shape
    zeros = torch.zeros(shape[1], dtype=torch.bfloat16, device=device)
    assert torch.equal(results["w"], zeros) and torch.equal(results["b"], zeros)


@pytest.mark.parametrize("case", [Case(rows=4), Case(rows=4, rms=True, adds=True)], ids=str)
def test_nan_stays_in_its_row(case: Case, device: torch.device) -> None:
    given = case.tensors(device)
    given["x"][1, 5] = math.nan
    found = forward(case, given)
    for result in (found[0], backward(case, given, found)["r"]):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third row starts 2^31 + 16 elements after the first: a product of 32-bit numbers would be negative.

    The row stride itself fits 32 bits, or it would widen the product. Of the 4 GiB no page between the rows is
    touched.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    strides = (2**30 + 8, 1)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 32), strides)
    far.copy_(make_tensor(3, 32, dtype=torch.float16))
    case = Case(rows=3, width=32, dtype="fp16", adds=True)
    given = case.tensors(device)
    for form in FORMS.values():
        runs = []
        for tensor in (far, far.contiguous()):
            given |= {"x": tensor, "residual": tensor, "dy": tensor, "dresidual_out": tensor}
            y, summed, mean, rstd = forward(case, given, form[0])
            found = (y, tensor, mean, rstd)  # the backward reads it in the place of the sum
            runs.append((y, summed, *backward(case, given, found, form[1]).values()))
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
