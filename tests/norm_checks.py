"""One call of the two norm launchers with any options, and the reference's results for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels._norm_config import NormBackwardConfig, NormConfig
from fastattn.kernels.norm_backward import norm_backward
from fastattn.kernels.norm_forward import norm_forward
from fastattn.testing import assert_accurate, make_tensor

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Forms of the kernels, forced at small widths: what is selected, rows in column tiles, the last of them partly
# filled, programs that each walk several blocks of rows, and more programs than partial sums are added up at a time.
_TILE = NormConfig(block_m=4, block_n=32, num_warps=1)
_ROW = NormConfig(block_m=1, block_n=1024, num_warps=1)
Form = tuple[NormConfig | None, NormBackwardConfig | None]
FORMS: dict[str, Form] = {
    "selected": (None, None),
    "tiles": (_TILE, NormBackwardConfig(walk=_TILE, row_means=_TILE, sums=_TILE, programs=3)),
    "one-row": (_ROW, NormBackwardConfig(_ROW, _TILE, sums=NormConfig(2, 32, 1), programs=3)),
}


@dataclass(frozen=True)
class Case:
    """One normalization: its sizes, dtypes, parameters and options."""

    rows: int = 7
    width: int = 63
    dtype: str = "fp32"
    parameters: str | None = None
    has_weight: bool = True
    has_bias: bool = True
    rms: bool = False
    zero_centered: bool = False
    adds: bool = False
    has_residual: bool = True
    residual: str | None = None
    rowscale: bool = False
    dropout_p: float = 0.0
    out: str | None = None
    from_output: bool = False

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        size = f"{changed.pop('rows', self.rows)}x{changed.pop('width', self.width)}"
        return "-".join([size, *(name if x is True else f"{name}={x}" for name, x in changed.items())])

    @property
    def out_dtype(self) -> torch.dtype:
        return DTYPES[self.out or self.dtype]

    @property
    def sum_dtype(self) -> torch.dtype | None:
        return DTYPES[self.residual or self.dtype] if self.adds else None

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """x, weight, bias, residual; the gradients dy and dresidual_out; rowscale and seed: those that there are."""
        dtype, parameters = DTYPES[self.dtype], DTYPES[self.parameters or self.dtype]
        shape = (self.rows, self.width)
        found = {
            "x": make_tensor(*shape, dtype=dtype, device=device, seed=0),
            "dy": make_tensor(*shape, dtype=self.out_dtype, device=device, seed=1),
        }
        if self.has_weight:
            # Away from zero, which y would keep nothing of.
            weight = make_tensor(self.width, device=device, seed=2).abs() + 0.5
            found["weight"] = (weight - 1.0 if self.zero_centered else weight).to(parameters)
        if self.has_bias and not self.rms:
            found["bias"] = make_tensor(self.width, dtype=parameters, device=device, seed=3)
        if self.adds:
            assert self.sum_dtype is not None
            found["dresidual_out"] = make_tensor(*shape, dtype=self.sum_dtype, device=device, seed=4)
            if self.has_residual:
                found["residual"] = make_tensor(*shape, dtype=self.sum_dtype, device=device, seed=5)
            if self.rowscale:
                found["rowscale"] = make_tensor(self.rows, device=device, seed=6)
            if self.dropout_p:
                found["seed"] = torch.tensor([12345678901, 7], device=device)
        return found


def forward(case: Case, given: dict[str, Tensor], config: NormConfig | None = None) -> tuple[Tensor, ...]:
    """y, the sum, mean and rstd."""
    names = ("residual", "weight", "bias", "rowscale", "seed")
    return norm_forward(
        given["x"], *map(given.get, names), 1, EPS, not case.rms, case.zero_centered, case.dropout_p,
        case.sum_dtype, case.out_dtype, config=config,
    )  # fmt: skip


def backward(
    case: Case,
    given: dict[str, Tensor],
    found: tuple[Tensor, ...],
    config: NormBackwardConfig | None = None,
    asked: str = "rxwb",
) -> dict[str, Tensor]:
    """The gradients of residual (of x where nothing is added), x, weight and bias, as `asked` by their letters."""
    y, summed, mean, rstd = found
    kept = y if case.from_output else summed if case.adds else given["x"]
    dtypes = {"r": case.sum_dtype or given["x"].dtype, "x": given["x"].dtype if case.adds else None}
    dtypes |= {name[0]: given[name].dtype if name in given else None for name in ("weight", "bias")}
    results = norm_backward(
        given["dy"], given.get("dresidual_out"), kept, given.get("weight"), given.get("bias"), given.get("rowscale"),
        given.get("seed"), None if case.rms or case.from_output else mean, rstd, 1, not case.rms, case.zero_centered,
        case.from_output, case.dropout_p, *(dtypes[name] if name in asked else None for name in "rxwb"),
        config=config,
    )  # fmt: skip
    return dict(zip("rxwb", results, strict=True))


def kept_elements(case: Case, given: dict[str, Tensor]) -> Tensor | None:
    """What dropout keeps: where the sum made of ones is not zero."""
    if "seed" not in given:
        return None
    ones = {"x": torch.ones_like(given["x"]), "seed": given["seed"]}
    _, summed, _, _ = forward(Case(adds=True, has_weight=False, dropout_p=case.dropout_p, rms=True), ones)
    return summed > 0


def expected(case: Case, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the sum and every gradient of the reference, computed in `dtype` on the same rounded inputs.

    The sum is rounded as it is stored, and the gradients pass that by.
    """
    names = [name for name in ("x", "residual", "weight", "bias") if name in given]
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in names}
    total = leaves["x"]
    if case.adds:
        total = reference.residual_sum(
            total,
            leaves.get("residual"),
            dropout_p=case.dropout_p,
            keep=kept_elements(case, given),
            rowscale=given["rowscale"].to(dtype) if "rowscale" in given else None,
            residual_dtype=dtype,
        )
        total = total + (total.to(case.sum_dtype).to(dtype) - total).detach()
    weight, options = leaves.get("weight"), {"zero_centered_weight": case.zero_centered}
    if case.rms:
        y = reference.rms_norm(total, case.width, weight, EPS, **options)
    else:
        y = reference.layer_norm(total, case.width, weight, leaves.get("bias"), EPS, **options)
    outputs, grads = [y], [given["dy"].to(dtype)]
    if case.adds:
        outputs, grads = [y, total], [*grads, given["dresidual_out"].to(dtype)]
    gradients = dict(zip(names, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))
    letters = {name[0]: gradient for name, gradient in gradients.items()}
    if not case.adds:
        letters["r"] = letters.pop("x")
    return {"y": y.detach(), "sum": total.detach(), **letters}


def check(case: Case, given: dict[str, Tensor], form: Form = (None, None)) -> None:
    """Runs both launchers and compares everything they return with the reference in float64.

    The peer is the reference in float32, rounded to the dtype of the result: better than PyTorch's own
    operators, which round more often.
    """
    copies = {name: tensor.clone() for name, tensor in given.items()}
    found = forward(case, given, form[0])
    results = backward(case, given, found, form[1])
    results |= {"y": found[0]} | ({"sum": found[1]} if case.adds else {})
    truth, peer = expected(case, given, torch.float64), expected(case, given, torch.float32)
    for name, result in results.items():
        if name not in truth:
            assert result.shape == (0,) or name == "r"
            continue
        growth = math.sqrt(case.rows) if name in "wb" else 1.0
        dtype = result.dtype
        if case.from_output and case.out_dtype.itemsize == 2:
            dtype, growth = (
                case.out_dtype,
                2.0 * growth,
            )  # x_hat has the rounding of y, relative to |y / scale|
        assert_accurate(result.to(dtype), peer[name].to(dtype), truth[name], name=name, growth=growth)
    check_statistics(case, found[1] if case.adds else given["x"], found[2], found[3])
    for name, before in copies.items():
        assert torch.equal(before, given[name]), name


def check_statistics(case: Case, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Mean and rstd to float32's precision, whatever x's dtype."""
    wide = x.double()
    assert mean.dtype == rstd.dtype == torch.float32
    squares = wide.square().mean(-1) if case.rms else wide.var(-1, correction=0)
    assert ((rstd * (squares + EPS).sqrt() - 1).abs() <= 1e-5).all()
    if case.rms:
        assert mean.shape == (0,)
    else:
        # A mean's rounding errors are relative to the values it is of.
        scale = wide.abs().amax(-1)
        assert ((mean - wide.mean(-1)).abs() <= 4 * 2.0**-23 * scale).all()
