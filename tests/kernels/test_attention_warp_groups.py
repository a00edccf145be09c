"""The forward by warp groups (sm_90, Gluon), simulated: right, without races and deadlocks, under many schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels._arguments import LOG2_E, Rows
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import form_reason, select_attention_form, warp_groups_reason
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS, target_of
from fastattn.kernels.attention_forward import attention_forward
from tests.attention_checks import AttentionCase, assert_attention_accurate
from tests.gluon_device import SimulationError
from tests.gluon_simulator import Descriptor, Pointer, simulate
from tests.warp_group_checks import RING_CHANGES, among_nan, assert_some_schedule_fails

SM_90 = KNOWN_TARGETS["sm_90"]
BF16 = torch.bfloat16
_REASON = form_reason(64, BF16, SM_90, "plain", "warp_groups")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def run(
    case: AttentionCase,
    seed: int,
    stages: int = 2,
    together: int = 1,
    sinks: Tensor | None = None,
    change: tuple[str, str] | None = None,
    width: int = 16,
) -> dict[str, Tensor]:
    """out and lse by tiles of 32 keys, q's and k's `width` wide, from inputs and into outputs that lie among NaN."""
    from fastattn.kernels.attention_forward_warp_groups import _attention_forward_warp_groups_kernel

    inputs = case.inputs(torch.device("cpu"))
    q, k, v = (among_nan(inputs[name]) for name in "qkv")
    out = among_nan(torch.full_like(q, math.nan))
    lse = torch.full(q.shape[:3], math.nan)
    simulate(
        _attention_forward_warp_groups_kernel,
        -(-case.seq_q // 128) * case.heads * case.batch,
        seed,
        change,
        q=Descriptor(q, [1, 1, 64, width]),
        k=Descriptor(k, [1, 1, 32, width]),
        v=Descriptor(v, [1, 1, 32, 16]),
        out=Rows(Pointer.to(out), *out.stride()[:3]),
        lse_ptr=Pointer.to(lse),
        sinks_ptr=None if sinks is None else Pointer.to(sinks),
        scale=LOG2_E / math.sqrt(case.head_dim),
        HEADS=case.heads,
        HEADS_TOGETHER=together,
        HEADS_ABSENT=-case.heads * case.batch % together,
        GROUPS=case.heads // case.kv_heads,
        SEQ_Q=case.seq_q,
        SEQ_K=case.seq_k,
        RIGHT=0 if case.causal else -1,
        HAS_RIGHT=bool(case.causal),
        BOTTOM_RIGHT=case.causal == "bottom_right",
        V_DIM=case.head_dim,
        BLOCK_M=128,
        BLOCK_N=32,
        STAGES=stages,
    )
    memory = out._base
    assert memory is not None and memory.isfinite().sum() == out.numel()
    return {"out": out, "lse": lse}


CASES = [
    # Grouped heads, two blocks of queries, a width that is no power of two, rows and keys that end within tiles.
    AttentionCase(1, 4, 2, 140, 150, 12, False, dtype=BF16),
    AttentionCase(2, 2, 1, 200, 150, 16, "top_left", dtype=BF16),
    # The first 101 rows see no key: all of a group's, and some of the other's.
    AttentionCase(1, 2, 1, 190, 89, 16, "bottom_right", dtype=torch.float16),
    AttentionCase(1, 1, 1, 256, 448, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 2, 2, 1, 33, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 1, 1, 65, 1, 16, "top_left", dtype=BF16),
]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_warp_groups_are_right_under_any_schedule(case: AttentionCase, stages: int) -> None:
    """To the bit the same: what a group computes does not depend on who was first."""
    together = 1 if stages == 2 else 3
    first = run(case, 0, stages, together)
    assert_attention_accurate(case, case.inputs(torch.device("cpu")), first)
    for seed in range(1, 5):
        again = run(case, seed, stages, together)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_wide_q_is_the_same() -> None:
    case = CASES[1]
    found = run(case, 1, width=256)
    assert_attention_accurate(case, case.inputs(torch.device("cpu")), found)


def test_sinks_are_one_more_key() -> None:
    """One that counts, and one of -inf, which does not; rows without a key have the sink as lse."""
    case = AttentionCase(1, 2, 1, 70, 45, 16, "bottom_right", dtype=BF16)
    sinks = torch.tensor([0.5, -math.inf])
    plain, found = run(case, 1), run(case, 1, sinks=sinks)
    lse = torch.logaddexp(plain["lse"], sinks.view(1, 2, 1))
    torch.testing.assert_close(found["lse"], lse)
    share = (plain["lse"] - lse).exp().nan_to_num(0.0).unsqueeze(-1)
    torch.testing.assert_close(found["out"].float(), plain["out"].float() * share, atol=1e-2, rtol=1e-2)


# Text of the kernel, and what in its place is to fail.
CHANGES = {
    **RING_CHANGES,
    "full-in-the-other-phase": (
        "(step % STAGES), (step // STAGES) & 1)",
        "(step % STAGES), ((step // STAGES) & 1) ^ 1)",
    ),
    "no-wait-for-the-queries": ("mbarrier.wait(queries[1].index(GROUP), 0)", "pass"),
    "keys-released-while-they-are-read": (
        "        products = warpgroup_mma_wait(0, deps=[running])\n        _release(keys, step + 1)",
        "        _release(keys, step + 1)\n        products = warpgroup_mma_wait(0, deps=[running])",
    ),
    "values-released-before-they-are-read": (
        "    accumulator = warpgroup_mma(weights",
        "    _release(values, step)\n    accumulator = warpgroup_mma(weights",
    ),
    "products-waited-for-too-little": (
        "warpgroup_mma_wait(0, deps=[running])",
        "warpgroup_mma_wait(1, deps=[running])",
    ),
    "released-twice": ("(free.index(step % STAGES), count=1)", "(free.index(step % STAGES), count=2)"),
    "another-slot-released": ("arrive(free.index(step % STAGES)", "arrive(free.index((step + 1) % STAGES)"),
    "full-and-free-exchanged": (
        "_barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)",
        "_barriers(STAGES, CONSUMERS), _barriers(STAGES, 1)",
    ),
    "half-of-the-bytes-expected": ("source.block_type.nbytes)", "source.block_type.nbytes // 2)"),
    "another-slot-filled": ("    slot = step % STAGES", "    slot = (step + 1) % STAGES"),
    "a-tile-too-few": ("    _load(v, batch, kv_head, 0, values, tiles - 1)", "    pass"),
    "tiles-skipped-and-not-released": ("        _arrived(keys, step)\n        _release(keys, step)", "        pass"),
    "values-of-another-tile": ("first + BLOCK_N, values", "first, values"),
    "a-full-tile-too-many": ("tiles - full_end // BLOCK_N, begin)", "tiles - full_end // BLOCK_N - 1, begin)"),
    "a-key-too-few": ("(keys & -8) <=", "(keys & -8) <"),
    "eighths-of-keys-alone-masked": ("gl.expand_dims(last, 1) - (keys & 7)", "gl.expand_dims(last, 1)"),
    "a-group-without-a-step": ("gl.maximum(gl.cdiv(end, BLOCK_N), 1)\n    full", "gl.cdiv(end, BLOCK_N)\n    full"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_simulation_finds_what_is_wrong(name: str) -> None:
    """Each barrier, wait and release is there for something: without it some schedule fails."""
    cases = [
        AttentionCase(1, 1, 1, 256, 260, 16, "top_left", dtype=BF16),
        AttentionCase(1, 1, 1, 128, 40, 16, "bottom_right", dtype=BF16),
    ]
    assert_some_schedule_fails(run, cases, CHANGES[name], 24)


def test_tiles_for_other_than_two_groups_do_not_compile() -> None:
    """Tuning doubles tiles: two groups more would be waited for, and never come."""
    case = AttentionCase(1, 1, 1, 64, 40, 16, False, dtype=BF16)
    with pytest.raises(SimulationError, match="there are two warp groups, of 64 queries each"):
        run(case, 0, change=("BLOCK_M // _ROWS", "2 * BLOCK_M // _ROWS"))


def test_a_deadlock_says_who_waits_for_what() -> None:
    case = AttentionCase(1, 1, 1, 64, 200, 16, False, dtype=BF16)
    with pytest.raises(
        SimulationError, match=r"deadlock: .*_produce#2 waits for phase 0 of allocation 5\[0\]"
    ):
        run(case, 0, change=CHANGES["slots-never-released"])


def test_calls_that_warp_groups_do_not_serve_get_pointers(device: torch.device) -> None:
    """With tiles for pointers, as in the interpreter; on a GPU, of rows that no descriptor can read."""
    case = AttentionCase(1, 2, 1, 40, 45, 10, "bottom_right", dtype=BF16)
    q, k, v, *_ = case.inputs(device).values()
    options = AttentionOptions(0.3, right=0, bottom_right=True)
    asked = select_attention_form(16, BF16, SM_90, "plain", "warp_groups")
    plain = select_attention_config(16, BF16, target_of(device))
    found = attention_forward(q, k, v, *options, config=asked)
    expected = attention_forward(q, k, v, *options, config=plain)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_warp_groups_say_what_they_do_not_serve() -> None:
    q, options = torch.zeros(1, 1, 8, 16, dtype=BF16), AttentionOptions(0.25)
    assert warp_groups_reason(q, SM_90, options) is None
    assert "sm_90, not for interpreter" in str(warp_groups_reason(q, INTERPRETER, options))
    assert "not for sm_100" in str(warp_groups_reason(q, KNOWN_TARGETS["sm_100"], options))
    for scale in (0.0, -1.0):
        assert f"scale={scale} must be above 0" in str(
            warp_groups_reason(q, SM_90, options._replace(scale=scale))
        )
    odd: Any = torch.zeros(2, 1, 8, 20, dtype=BF16)
    assert "a stride of 40 bytes" in str(warp_groups_reason(odd, SM_90, options))
