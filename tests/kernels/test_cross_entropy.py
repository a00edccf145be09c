"""The cross-entropy launchers: every form of the kernels at small odd sizes, and at real sizes on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import reference
from fastattn.kernels._loss_config import (
    CrossEntropyConfig,
    RowStrides,
    row_strides,
    select_cross_entropy_backward_config,
    select_cross_entropy_forward_config,
)
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.kernels.cross_entropy_backward import cross_entropy_backward, cross_entropy_backward_
from fastattn.kernels.cross_entropy_forward import cross_entropy_forward, cross_entropy_of_chunk
from fastattn.testing import assert_accurate, make_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    """One loss: its sizes and options; every third row is ignored from the second on."""

    rows: int = 7
    classes: int = 63
    dtype: str = "fp32"
    reduction: str = "none"
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    ignored: bool = True

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.classes}", self.dtype, self.reduction]
        parts += [f"smooth{self.smoothing}"] if self.smoothing else []
        parts += [f"z{self.z_loss}"] if self.z_loss else []
        parts += [f"cap{self.softcap}"] if self.softcap else []
        return "-".join(parts)

    @property
    def scale(self) -> float:
        """Of one class loss and gradient are 0, as differences of numbers about 1."""
        return 1.0 if self.classes == 1 else 0.0

    @property
    def options(self) -> tuple[int, str, float, float, float | None]:
        return -100, self.reduction, self.smoothing, self.z_loss, self.softcap

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        logits = 3 * make_tensor(self.rows, self.classes, dtype=DTYPES[self.dtype], device=device)
        target = torch.randint(self.classes, (self.rows,), generator=torch.Generator().manual_seed(1))
        if self.ignored:
            target[1::3] = -100
        return logits, target.to(device)


def expected(
    case: Case, logits: Tensor, target: Tensor, dloss: Tensor, dlse: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Loss, log-sum-exp and dlogits of the formula, computed in `dtype` on the same rounded inputs."""
    leaf = logits.detach().to(dtype).requires_grad_()
    loss, lse = reference.cross_entropy(leaf, target, None, *case.options, return_lse=True)
    (dlogits,) = torch.autograd.grad((loss, lse), leaf, (dloss.to(dtype).reshape(loss.shape), dlse.to(dtype)))
    return {"loss": loss.detach(), "lse": lse.detach(), "dlogits": dlogits}


def check(
    case: Case,
    logits: Tensor,
    target: Tensor,
    forward: CrossEntropyConfig | None = None,
    backward: CrossEntropyConfig | None = None,
) -> None:
    """Runs the launchers and compares all they return with the reference in float64.

    The peer is the reference in float32, rounded to the dtype of the result: better than PyTorch's own operator.
    """
    copy = logits.clone()
    count = case.rows if case.reduction == "none" else 1
    dloss = make_tensor(count, device=logits.device, seed=5).reshape(
        (count,) if case.reduction == "none" else ()
    )
    dlse = make_tensor(case.rows, device=logits.device, seed=6)
    loss, statistics, kept = cross_entropy_forward(
        logits, target, *case.options, torch.float32, True, config=forward
    )
    given = (dloss, dlse, logits, target, statistics, kept, *case.options)
    dlogits = cross_entropy_backward(*given, config=backward)
    found = {"loss": loss, "lse": statistics.sum(0), "dlogits": dlogits}
    truth = expected(case, logits, target, dloss, dlse, torch.float64)
    peer = expected(case, logits, target, dloss, dlse, torch.float32)
    for name, actual in found.items():
        assert_accurate(actual, peer[name].to(actual.dtype), truth[name], name=name, scale=case.scale)
    assert torch.equal(logits, copy)
    assert torch.equal(dlogits, cross_entropy_backward(*given, config=backward))
    check_chunk(case, logits, target, dloss, forward)


def check_chunk(
    case: Case, logits: Tensor, target: Tensor, dloss: Tensor, config: CrossEntropyConfig | None
) -> None:
    """The kernel that writes the gradient over the logits, with a gradient for each row where there is one."""
    plain = Case(**{**vars(case), "reduction": "none"})
    scale = dloss if case.reduction == "none" else None
    ones = torch.ones(case.rows, device=logits.device) if scale is None else scale
    zeros = torch.zeros_like(ones)
    truth = expected(plain, logits, target, ones, zeros, torch.float64)
    peer = expected(plain, logits, target, ones, zeros, torch.float32)
    losses, written = torch.empty_like(ones), logits.clone()
    ignore_index, _, *others = case.options
    cross_entropy_of_chunk(written, target, scale, losses, ignore_index, *others, True, config=config)
    assert_accurate(losses, peer["loss"], truth["loss"], name="losses of a chunk", scale=case.scale)
    peer["dlogits"] = peer["dlogits"].to(logits.dtype)
    assert_accurate(written, peer["dlogits"], truth["dlogits"], name="gradient of a chunk", scale=case.scale)


CLASSES = [Case(classes=classes, smoothing=0.1) for classes in (1, 2, 63, 127, 128, 300)]
ROWS = [Case(rows=rows, classes=17, reduction="mean") for rows in (1, 13)]
OPTIONS = [
    Case(reduction="mean", z_loss=0.01, classes=200),
    Case(reduction="sum", softcap=2.0, classes=200),
    Case(reduction="mean", smoothing=0.2, z_loss=0.1, softcap=5.0, classes=130),
    Case(smoothing=1.0),
    Case(reduction="mean", ignored=False),
]
PRECISIONS = [Case(dtype=dtype, classes=127, z_loss=0.01) for dtype in ("bf16", "fp16")]
# tanh in 16 bits is a form of its own.
PRECISIONS += [Case(dtype=d, classes=127, softcap=cap) for d, cap in (("bf16", 30.0), ("fp16", 2.0))]


@pytest.mark.parametrize("case", [*CLASSES, *ROWS, *OPTIONS, *PRECISIONS], ids=str)
def test_matches_reference(case: Case, device: torch.device) -> None:
    check(case, *case.inputs(device))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("classes", [3, 200])
def test_shipped_configs_match_reference(classes: int, target: str, device: torch.device) -> None:
    """The tiles that GPUs run, of up to 64 rows, with a number of rows that fills none of them."""
    arguments = classes, math.gcd(classes, 16), torch.float32, KNOWN_TARGETS[target]
    forward, backward = (
        select(*arguments)
        for select in (select_cross_entropy_forward_config, select_cross_entropy_backward_config)
    )
    case = Case(rows=9, classes=classes, smoothing=0.1)
    check(case, *case.inputs(device), forward, backward)


@pytest.mark.parametrize(
    "shape, strides",
    [((6, 37), (50, 1)), ((2, 3, 37), (200, 40, 1)), ((2, 3, 37), (37, 74, 1)), ((6, 1), (5, 9))],
    ids=str,
)
def test_rows_where_they_are(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> None:
    """Gaps hold NaN, and are neither read nor, by a gradient in place, written."""
    logits = make_tensor(*shape, strides=strides, device=device)
    rows = logits.reshape(-1, shape[-1])
    target = torch.arange(6, device=device) % shape[-1]
    options = (-100, "mean", 0.1, 0.0, None)
    found = cross_entropy_forward(logits, target.view(shape[:-1]), *options, torch.float32, False)
    loss, statistics, kept = cross_entropy_forward(rows.contiguous(), target, *options, torch.float32, False)
    assert torch.equal(found[0], loss) and torch.equal(found[1].flatten(1), statistics)
    one = torch.ones((), device=device)
    dlogits = cross_entropy_backward(one, None, rows.contiguous(), target, statistics, kept, *options)
    given = (one, None, logits, target.view(shape[:-1]), *found[1:], *options)
    assert torch.equal(cross_entropy_backward(*given).flatten(0, -2), dlogits)
    storage = logits.as_strided((logits.untyped_storage().nbytes() // 4,), (1,), 0)
    gaps = storage.isnan().sum()
    cross_entropy_backward_(*given)
    assert torch.equal(logits.reshape(-1, shape[-1]), dlogits)
    assert storage.isnan().sum() == gaps


@pytest.mark.parametrize(
    "shape, strides, expected",
    [
        ((8,), (1,), RowStrides(0, 0, None)),
        ((6, 8), (8, 1), RowStrides(0, 8, None)),
        ((6, 8), (0, 1), RowStrides(0, 0, None)),
        ((2, 3, 8), (24, 8, 1), RowStrides(0, 8, None)),
        ((2, 3, 8), (32, 8, 1), RowStrides(32, 8, 3)),
        ((2, 3, 8), (8, 16, 1), RowStrides(8, 16, 3)),
        ((2, 1, 3, 8), (32, 5, 8, 1), RowStrides(32, 8, 3)),
        ((2, 2, 3, 8), (100, 48, 8, 1), None),
        ((6, 1), (3, 7), RowStrides(0, 3, None)),
        ((6, 8), (1, 6), None),
    ],
    ids=str,
)
def test_row_strides(shape: tuple[int, ...], strides: tuple[int, ...], expected: RowStrides | None) -> None:
    assert row_strides(shape, strides) == expected


def run(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Losses and dlogits of their sum."""
    options = (-100, "none", *(options or (0.0, 0.0, None)))
    losses, statistics, kept = cross_entropy_forward(logits, target, *options, torch.float32, False)
    ones = torch.ones_like(losses)
    return losses, cross_entropy_backward(ones, None, logits, target, statistics, kept, *options)


def test_infinite_logits_are_as_pytorchs(device: torch.device) -> None:
    """-inf among the classes, at the target, in the whole row and in the whole first tile; +inf; NaN."""
    logits = make_tensor(6, 300, device=device)
    logits[0, ::2] = -math.inf
    logits[1, 7] = -math.inf
    logits[2] = -math.inf
    logits[3, :256] = -math.inf
    logits[4, 9] = math.inf
    logits[5, 9] = math.nan
    target = torch.tensor([1, 7, 7, 299, 7, 7], device=device)
    leaf = logits.clone().requires_grad_()
    truth = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    found, dlogits = run(logits, target)
    torch.testing.assert_close(found, truth.detach(), equal_nan=True)
    torch.testing.assert_close(dlogits, torch.autograd.grad(truth.sum(), leaf)[0], equal_nan=True)


def test_large_logits_keep_their_digits(device: torch.device) -> None:
    """A log-sum-exp of 10,000 has three digits behind the point in float32; the difference to a logit has seven."""
    logits = 10_000 + make_tensor(4, 200, device=device)
    target = torch.arange(4, device=device)
    losses, dlogits = run(logits, target)
    leaf = logits.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        dlogits.double(), torch.autograd.grad(truth.sum(), leaf)[0], rtol=1e-5, atol=1e-7
    )


def test_ignored_rows_are_not_read(device: torch.device) -> None:
    logits = make_tensor(5, 40, device=device)
    logits[1] = math.nan
    target = torch.tensor([3, -100, 5, 6, -100], device=device)
    losses, dlogits = run(logits, target, 0.1, 0.1, 3.0)
    _, statistics, _ = cross_entropy_forward(
        logits, target, -100, "none", 0.0, 0.0, None, torch.float32, False
    )
    assert (statistics[1, [1, 4]] == -math.inf).all()  # the logarithm of an empty sum
    assert losses.isfinite().all() and (losses[[1, 4]] == 0).all()
    assert dlogits.isfinite().all() and (dlogits[[1, 4]] == 0).all()


@pytest.mark.parametrize("wrong", [40, -1, 1 << 40])
def test_a_target_that_is_no_class_is_nan_and_nothing_else(wrong: int, device: torch.device) -> None:
    logits = make_tensor(3, 40, device=device)
    for options in ((0.0, 0.0, None), (0.5, 0.1, 3.0)):
        losses, dlogits = run(logits, torch.tensor([3, wrong, 5], device=device), *options)
        assert losses.isnan().tolist() == [False, True, False]
        assert dlogits.isnan().all(1).tolist() == [False, True, False]
        assert dlogits[[0, 2]].isfinite().all()


def test_every_row_ignored(device: torch.device) -> None:
    logits, target = make_tensor(3, 5, device=device), torch.full((3,), -100, device=device)
    options = (-100, "mean", 0.0, 0.0, None)
    loss, statistics, kept = cross_entropy_forward(logits, target, *options, torch.float32, False)
    assert loss.isnan() and kept == 0
    one = torch.ones((), device=device)
    assert (cross_entropy_backward(one, None, logits, target, statistics, kept, *options) == 0).all()


def test_sums_of_more_rows_than_one_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.kernels.cross_entropy_forward._REDUCE_BLOCK", 4)
    logits, target = make_tensor(11, 3, device=device), torch.arange(11, device=device) % 3
    target[::4] = -100
    for reduction in ("mean", "sum"):
        loss, _, kept = cross_entropy_forward(
            logits, target, -100, reduction, 0.0, 0.0, None, torch.float32, False
        )
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        )
        assert kept == 8


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_memory_is_not_filled_before_it_is_written(reduction: str, device: torch.device) -> None:
    """Zeros for the number of kept rows were a launch of their own in every forward, and then written over."""
    logits, target = make_tensor(3, 5, device=device), torch.tensor([0, 4, -100], device=device)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), keywords: Any = None) -> Any:
            called.append(operator.__name__)
            return operator(*given, **(keywords or {}))

    torch.use_deterministic_algorithms(False)  # which fills memory with NaN for the tests
    with Calls():
        _, _, kept = cross_entropy_forward(
            logits, target, -100, reduction, 0.0, 0.0, None, torch.float32, False
        )
    assert not [name for name in called if any(word in name for word in ("zero", "fill", "full", "ones"))]
    assert kept.shape == ((0,) if reduction == "none" else ())
    assert reduction == "none" or kept == 2


def test_configs() -> None:
    for name, target in KNOWN_TARGETS.items():
        for select in (select_cross_entropy_forward_config, select_cross_entropy_backward_config):
            for classes in (1, 2, 1000, 50_257, 50_304, 262_144):
                config = select(classes, math.gcd(classes, 16), torch.bfloat16, target)
                assert config.num_warps in (1, 2, 4, 8), name
                assert config.block_m * config.block_n <= 8192
                assert config.block_m == 1 or config.block_n >= classes
    wide = select_cross_entropy_forward_config(50_304, 16, torch.bfloat16, KNOWN_TARGETS["sm_90"])
    assert wide == CrossEntropyConfig(1, 8192, 8)
    odd = select_cross_entropy_forward_config(50_257, 1, torch.bfloat16, KNOWN_TARGETS["sm_90"])
    assert odd == CrossEntropyConfig(1, 2048, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, classes", [(1024, 50_257), (1024, 50_304), (64, 262_144), (100_000, 2)])
def test_real_sizes(rows: int, classes: int, dtype: str, device: torch.device) -> None:
    for case in (Case(rows, classes, dtype), Case(rows, classes, dtype, "none", 0.1, 1e-4, 30.0)):
        check(case, *case.inputs(device))


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits(device: torch.device) -> None:
    rows, classes = 45_000, 50_304
    logits = torch.randn(rows, classes, dtype=torch.bfloat16, device=device)
    target = torch.randint(classes, (rows,), device=device)
    losses, dlogits = run(logits, target)
    last = slice(rows - 64, rows)
    again = run(logits[last].contiguous(), target[last])
    assert torch.equal(losses[last], again[0]) and torch.equal(dlogits[last], again[1])
