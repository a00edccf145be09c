"""dq by warp groups (sm_90, Gluon), simulated: right, without races and deadlocks, under many schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastattn.kernels._arguments import Rows
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import dq_warp_groups_reason, form_reason, select_attention_form
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS, target_of
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
from fastattn.testing import assert_accurate, make_tensor
from tests.attention_checks import AttentionCase, assert_attention_accurate, naive_results
from tests.gluon_simulator import Descriptor, Pointer, simulate
from tests.warp_group_checks import RING_CHANGES, among_nan, assert_some_schedule_fails

SM_90 = KNOWN_TARGETS["sm_90"]
BF16 = torch.bfloat16
_REASON = form_reason(64, BF16, SM_90, "plain", "warp_groups")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def simulated(
    given: dict[str, Tensor],
    seed: int,
    causal: bool | str,
    right: int = 0,
    block_n: int = 32,
    stages: int = 2,
    together: int = 1,
    scale: float | None = None,
    change: tuple[str, str] | None = None,
) -> Tensor:
    """dq from q, k, v, dout, which are copied among NaN, lse and delta, into an output that lies among NaN."""
    from fastattn.kernels.attention_backward_dq_warp_groups import _attention_dq_warp_groups_kernel

    q, k, v, dout = (among_nan(given[name]) for name in ("q", "k", "v", "dout"))
    dq = among_nan(torch.full_like(q, math.nan))
    batch, heads, seq_q, head_dim = q.shape
    width_q, width_v = (max(16, 1 << (tensor.size(3) - 1).bit_length()) for tensor in (q, v))
    simulate(
        _attention_dq_warp_groups_kernel,
        -(-seq_q // 128) * heads * batch,
        seed,
        change,
        q=Descriptor(q, [1, 1, 64, width_q]),
        k=Descriptor(k, [1, 1, block_n, width_q]),
        v=Descriptor(v, [1, 1, block_n, width_v]),
        dout=Descriptor(dout, [1, 1, 64, width_v]),
        dq=Rows(Pointer.to(dq), *dq.stride()[:3]),
        lse_ptr=Pointer.to(given["lse"]),
        delta_ptr=Pointer.to(given["delta"]),
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        HEADS=heads,
        GROUPS=heads // k.size(1),
        SEQ_Q=seq_q,
        SEQ_K=k.size(2),
        RIGHT=right if causal else -1,
        HEADS_TOGETHER=together,
        HEADS_ABSENT=-heads * batch % together,
        HAS_RIGHT=bool(causal),
        BOTTOM_RIGHT=causal == "bottom_right",
        HEAD_DIM=head_dim,
        BLOCK_M=128,
        BLOCK_N=block_n,
        STAGES=stages,
    )
    memory = dq._base
    assert memory is not None and memory.isfinite().sum() == dq.isfinite().sum()
    return dq


def run(
    case: AttentionCase,
    seed: int,
    block_n: int = 32,
    stages: int = 2,
    together: int = 1,
    change: tuple[str, str] | None = None,
) -> dict[str, Tensor]:
    """dq of a case, and lse, with which the truth holds its gradient, as delta does."""
    inputs = case.inputs(torch.device("cpu"))
    forward = naive_results(case, inputs, torch.float32)
    lse = forward["lse"].float()
    delta = (forward["out"].double() * inputs["dout"].double()).sum(-1).float() - inputs["dlse"].float()
    given = {**inputs, "lse": lse, "delta": delta.masked_fill(lse == -math.inf, 0.0)}
    dq = simulated(given, seed, case.causal, block_n=block_n, stages=stages, together=together, change=change)
    return {"lse": lse, "dq": dq}


CASES = [
    # Grouped heads, two blocks of queries, a width that is no power of two, rows and keys that end within tiles.
    AttentionCase(1, 4, 2, 150, 170, 12, False, dtype=BF16),
    AttentionCase(2, 2, 1, 140, 150, 16, "top_left", dtype=BF16),
    # The first 101 rows see no key: all of a group's, and some of the other's.
    AttentionCase(1, 2, 1, 190, 89, 16, "bottom_right", dtype=torch.float16),
    AttentionCase(1, 1, 1, 130, 256, 16, "bottom_right", dtype=BF16),
    # No row of the first block sees a key.
    AttentionCase(1, 1, 1, 200, 40, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 2, 2, 1, 33, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 1, 1, 65, 1, 16, "top_left", dtype=BF16),
]


@pytest.mark.parametrize(("block_n", "stages"), [(32, 2), (32, 3), (256, 1)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_warp_groups_are_right_under_any_schedule(case: AttentionCase, block_n: int, stages: int) -> None:
    """To the bit the same: what a group computes does not depend on who was first.

    Tiles of 256 keys leave no registers for q and dO, which are read from shared memory in each product.
    """
    together = 3 if stages == 3 else 1
    first = run(case, 0, block_n, stages, together)
    assert_attention_accurate(case, case.inputs(torch.device("cpu")), first)
    for seed in range(1, 4):
        again = run(case, seed, block_n, stages, together)
        assert torch.equal(first["dq"], again["dq"])


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("right", [1, 40])
def test_windows_and_values_of_another_width(causal: str, right: int) -> None:
    """A window that ends behind the diagonal, a v_dim that is not head_dim, a negative scale."""
    shapes = {"q": (1, 2, 135, 16), "k": (1, 1, 101, 16), "v": (1, 1, 101, 40), "dout": (1, 2, 135, 40)}
    given = {
        name: make_tensor(*shape, dtype=BF16, seed=seed) for seed, (name, shape) in enumerate(shapes.items())
    }
    offset = 101 - 135 if causal == "bottom_right" else 0
    hidden = torch.arange(101) > torch.arange(135).view(-1, 1) + offset + right

    def of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, dout = (given[name].to(dtype) for name in shapes)
        scores = (q @ k.mT * -0.3).masked_fill(hidden, -math.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        delta = (weights @ v * dout).sum(-1)
        return lse, delta, weights * (dout @ v.mT - delta.unsqueeze(-1)) @ k * -0.3

    (_, _, truth), (_, _, peer), (lse, delta, _) = of(torch.float64), of(BF16), of(torch.float32)
    found = simulated(given | {"lse": lse, "delta": delta}, 1, causal, right, scale=-0.3)
    assert_accurate(found, peer, truth, name="dq", scale=truth.abs().max().item())
    assert not found[:, :, hidden.all(-1)].any()


def test_a_group_does_not_read_tiles_that_it_does_not_see() -> None:
    """NaN in keys and values that the other group alone sees."""
    inputs = AttentionCase(1, 1, 1, 128, 128, 16, "top_left", dtype=BF16).inputs(torch.device("cpu"))
    inputs["lse"], inputs["delta"] = torch.full((2, 1, 1, 128), 4.0)
    whole = simulated(inputs, 2, "top_left")
    for name in ("k", "v"):
        inputs[name][:, :, 64:] = math.nan
    found = simulated(inputs, 2, "top_left")
    assert torch.equal(found[:, :, :64], whole[:, :, :64]) and found[:, :, 64:].isnan().all()


# Text of the kernel, and what in its place is to fail.
CHANGES = {
    **RING_CHANGES,
    "no-wait-for-the-queries": ("mbarrier.wait(own[1].index(GROUP), 0)", "pass"),
    "bytes-of-the-queries-alone-expected": ("q.block_type.nbytes + dout.block_type.nbytes", "q.block_type.nbytes"),
    "weights-read-before-their-product": ("wait(1, deps=[products])", "wait(2, deps=[products])"),
    "gradients-read-before-their-product": ("wait(0, deps=[dweights])", "wait(1, deps=[dweights])"),
    "dq-read-before-its-product": ("wait(0, deps=[dq])", "wait(1, deps=[dq])"),
    "values-released-while-they-are-read": (
        "    dweights = warpgroup_mma_wait(0, deps=[dweights])\n    _release(values, step)",
        "    _release(values, step)\n    dweights = warpgroup_mma_wait(0, deps=[dweights])",
    ),
    "keys-released-while-they-are-read": (
        "    dq = warpgroup_mma_wait(0, deps=[dq])\n    _release(keys, step)",
        "    _release(keys, step)\n    dq = warpgroup_mma_wait(0, deps=[dq])",
    ),
    "tiles-skipped-and-not-released": ("        _arrived(keys, step)\n        _release(keys, step)", "        pass"),
    "a-masked-tile-too-few": ("gl.maximum(tiles - full_end // BLOCK_N, begin)", "begin"),
    "a-tile-too-few": ("tiles - gl.cdiv(end, BLOCK_N)", "tiles - end // BLOCK_N"),
    "keys-of-the-first-tile": ("last_key - (tiles - 1 - step) * BLOCK_N", "last_key"),
    "the-other-groups-queries": ("_tile(own[0][0], slot)", "_tile(own[0][0], 1 - slot)"),
    "statistics-of-another-head": ("(batch * HEADS + head) * SEQ_Q", "(batch * HEADS) * SEQ_Q"),
    "statistics-of-another-row": ("delta_ptr + (statistics + rows)", "delta_ptr + (statistics + rows * 0)"),
    "values-of-another-tile": ("first, values, step)", "first + BLOCK_N, values, step)"),
    "no-scale": ("dq * scale", "dq"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_simulation_finds_what_is_wrong(name: str) -> None:
    """Each barrier, wait and release is there for something: without it some schedule fails."""
    cases = [
        AttentionCase(1, 2, 1, 128, 170, 16, "top_left", dtype=BF16),
        AttentionCase(1, 1, 1, 70, 90, 16, False, dtype=BF16),
    ]

    def changed(case: AttentionCase, seed: int, change: tuple[str, str] | None = None) -> dict[str, Tensor]:
        block_n, stages = (256, 1) if name == "the-other-groups-queries" else (32, 2 + seed % 2)
        return run(case, seed, block_n, stages, change=change)

    if name == next(iter(CHANGES)):  # as it is, nothing fails
        for case in cases:
            assert_attention_accurate(case, case.inputs(torch.device("cpu")), run(case, 0))
    assert_some_schedule_fails(changed, cases, CHANGES[name], 16)


def test_calls_that_warp_groups_do_not_serve_get_pointers(device: torch.device) -> None:
    """With tiles for pointers, as in the interpreter; on a GPU, of rows that no descriptor can read."""
    case = AttentionCase(1, 2, 1, 40, 45, 100, "bottom_right", dtype=BF16)
    q, k, v, dout, dlse = (t[..., :10] for t in case.inputs(device).values())
    dlse = case.inputs(device)["dlse"]
    options = AttentionOptions(0.3, right=0, bottom_right=True)
    out, lse = attention_forward(q, k, v, *options)
    needs = (True, False, False, False, False)
    configs = (
        select_attention_form(100, BF16, SM_90, "plain", "warp_groups"),
        select_attention_config(16, BF16, target_of(device)),
    )
    assert configs[0].dq.form == "warp_groups"
    found, expected = (
        attention_backward(dout, dlse, q, k, v, out, lse, needs, *options, config=config)[0]
        for config in configs
    )
    assert torch.equal(found, expected)


def test_dq_warp_groups_say_what_they_do_not_serve() -> None:
    assert dq_warp_groups_reason(SM_90) is None
    assert "sm_90, not for interpreter" in str(dq_warp_groups_reason(INTERPRETER))
    assert "not for sm_100" in str(dq_warp_groups_reason(KNOWN_TARGETS["sm_100"]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "v_dim", "right"), [(64, 128, 0), (128, 64, 100), (256, 128, 0), (72, 256, 7)]
)
def test_other_widths_and_windows_on_the_gpu(head_dim: int, v_dim: int, right: int) -> None:
    """As the kernel by pointers has it, and the same bits again."""
    device, width = torch.device("cuda"), max(head_dim, v_dim)
    reason = form_reason(width, BF16, target_of(device), "plain", "warp_groups")
    if reason is not None:
        pytest.skip(reason)
    q, k = (
        make_tensor(2, n, s, head_dim, dtype=BF16, device=device, seed=n) for n, s in ((4, 777), (2, 1000))
    )
    v = make_tensor(2, 2, 1000, v_dim, dtype=BF16, device=device, seed=3)
    dout = make_tensor(2, 4, 777, v_dim, dtype=BF16, device=device, seed=5)
    options = AttentionOptions(head_dim**-0.5, right=right, bottom_right=True)
    out, lse = attention_forward(q, k, v, *options)
    needs = (True, False, False, False, False)
    found, again, expected = (
        attention_backward(dout, None, q, k, v, out, lse, needs, *options, config=config)[0].float()
        for config in (
            select_attention_form(width, BF16, SM_90, "plain", "warp_groups"),
            select_attention_form(width, BF16, SM_90, "plain", "warp_groups"),
            select_attention_config(width, BF16, SM_90),
        )
    )
    assert torch.equal(found, again)
    torch.testing.assert_close(found, expected, atol=0.01 * expected.abs().max().item(), rtol=0.02)
