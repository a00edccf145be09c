"""dk and dv by warp groups (sm_90, Gluon), simulated: right, without races and deadlocks, under many schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels._arguments import Rows
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import dk_dv_warp_groups_reason, form_reason, select_attention_form
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS, target_of
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
from tests.attention_checks import AttentionCase, assert_attention_accurate, naive_results
from tests.gluon_device import SimulationError
from tests.gluon_simulator import Descriptor, Pointer, simulate
from tests.warp_group_checks import RING_CHANGES, among_nan, assert_some_schedule_fails

SM_90 = KNOWN_TARGETS["sm_90"]
BF16 = torch.bfloat16
_REASON = form_reason(64, BF16, SM_90, "plain", "warp_groups")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@dataclass(frozen=True)
class UnequalCase(AttentionCase):
    """With v of another width than q and k."""

    v_dim: int = 16

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        given = super().inputs(device)
        return given | {name: given[name][..., : self.v_dim].contiguous() for name in ("v", "dout")}


def run(
    case: AttentionCase,
    seed: int,
    stages: int = 2,
    together: int = 1,
    needs: tuple[bool, bool] = (True, True),
    change: tuple[str, str] | None = None,
    stages_dout: int | None = None,
    width: int = 16,
) -> dict[str, Tensor]:
    """dk and dv by tiles of 32 queries, from inputs and into outputs that lie among NaN.

    stages_dout: slots for tiles of dO, where not as many as for those of q.
    width: columns of a tile.
    """
    from fastattn.kernels.attention_backward_dk_dv_warp_groups import (
        _attention_dk_dv_warp_groups_kernel,
        _attention_statistics_kernel,
    )

    inputs = case.inputs(torch.device("cpu"))
    q, k, v, dout = (among_nan(inputs[name]) for name in ("q", "k", "v", "dout"))
    dk, dv = (among_nan(torch.full_like(of, math.nan)) for of in (k, v))
    forward = naive_results(case, inputs, torch.float32)
    lse = forward["lse"].float()
    delta = (forward["out"].double() * dout.double()).sum(-1).float() - inputs["dlse"].float()
    delta = delta.masked_fill(lse == -math.inf, 0.0)
    padded = -(-case.seq_q // 32) * 32
    count = case.batch * case.heads * padded
    found = torch.full((2, count), math.nan)
    _attention_statistics_kernel[(-(-count // 64),)](
        lse_ptr=lse, delta_ptr=delta, found_ptr=found, SEQ_Q=case.seq_q, PADDED=padded, COUNT=count, BLOCK=64
    )
    simulate(
        _attention_dk_dv_warp_groups_kernel,
        -(-case.seq_k // 128) * case.kv_heads * case.batch,
        seed,
        change,
        q=Descriptor(q, [1, 1, 32, width]),
        k=Descriptor(k, [1, 1, 64, width]),
        v=Descriptor(v, [1, 1, 64, width]),
        dout=Descriptor(dout, [1, 1, 32, width]),
        statistics=Descriptor(found.view(-1), [32]),
        dk=Rows(Pointer.to(dk), *dk.stride()[:3]),
        dv=Rows(Pointer.to(dv), *dv.stride()[:3]),
        scale=1.0 / math.sqrt(case.head_dim),
        KV_HEADS=case.kv_heads,
        GROUPS=case.heads // case.kv_heads,
        SEQ_Q=case.seq_q,
        SEQ_K=case.seq_k,
        ROWS=count,
        RIGHT=0 if case.causal else -1,
        HEADS_TOGETHER=together,
        HEADS_ABSENT=-case.kv_heads * case.batch % together,
        HAS_RIGHT=bool(case.causal),
        BOTTOM_RIGHT=case.causal == "bottom_right",
        NEEDS_DK=needs[0],
        NEEDS_DV=needs[1],
        HEAD_DIM=case.head_dim,
        V_DIM=v.size(3),
        BLOCK_M=32,
        BLOCK_N=128,
        STAGES=stages,
        STAGES_DOUT=stages if stages_dout is None else stages_dout,
    )
    for tensor, needed in zip((dk, dv), needs, strict=True):
        memory = tensor._base
        assert memory is not None and memory.isfinite().sum() == tensor.numel() * needed
    # With lse, whose gradient delta holds, the truth holds it too.
    return {"lse": lse} | ({"dk": dk} if needs[0] else {}) | ({"dv": dv} if needs[1] else {})


CASES = [
    # Grouped heads, two blocks of keys, a width that is no power of two, rows and keys that end within tiles.
    AttentionCase(1, 4, 2, 70, 150, 12, False, dtype=BF16),
    AttentionCase(2, 2, 1, 150, 140, 16, "top_left", dtype=BF16),
    # The first 61 rows see no key.
    AttentionCase(1, 2, 1, 150, 89, 16, "bottom_right", dtype=torch.float16),
    # No query sees the last keys: of a whole block, and of a group.
    AttentionCase(1, 2, 1, 40, 200, 16, "top_left", dtype=BF16),
    AttentionCase(1, 1, 1, 130, 256, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 2, 2, 1, 33, 16, "bottom_right", dtype=BF16),
    AttentionCase(1, 1, 1, 65, 1, 16, "top_left", dtype=BF16),
    UnequalCase(1, 2, 1, 70, 70, 16, "top_left", dtype=BF16, v_dim=9),
]


@pytest.mark.parametrize("stages", [(2, 1), (3, 3)], ids=lambda stages: "{}-and-{}".format(*stages))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_warp_groups_are_right_under_any_schedule(case: AttentionCase, stages: tuple[int, int]) -> None:
    """To the bit the same: what a group computes does not depend on who was first."""
    together = 1 if stages[0] == 2 else 3
    first = run(case, 0, stages[0], together, stages_dout=stages[1])
    assert_attention_accurate(case, case.inputs(torch.device("cpu")), first)
    for seed in range(1, 4):
        again = run(case, seed, stages[0], together, stages_dout=stages[1])
        assert all(torch.equal(one, again[name]) for name, one in first.items())


@pytest.mark.parametrize("width", [16, 256])
def test_a_gradient_alone_is_the_same(width: int) -> None:
    """Also by wide tiles, which have a launch for each; dk's has one slot for dO, free before its step ends."""
    case = CASES[1]
    both = run(case, 0, width=width)
    assert_attention_accurate(case, case.inputs(torch.device("cpu")), both)
    for needs, slots in (((True, False), 1), ((False, True), 2)):
        for seed in range(1, 4):
            for name, alone in run(case, seed, needs=needs, stages_dout=slots, width=width).items():
                assert torch.equal(alone, both[name])


# The end of a step, and its middle.
END = """    if NEEDS_DK and NEEDS_DV:
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    elif NEEDS_DK:
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dv = warpgroup_mma_wait(0, deps=[dv])
"""
MIDDLE = """        dweights = warpgroup_mma_wait(1 if NEEDS_DV else 0, deps=[dweights])
        delta = gradients[0][1].index(at).load(QUERIES)
"""
DK_FREES = """        if not NEEDS_DV:
            _release(gradients, step)
"""
END_FREES_QUERIES = "    _release(queries, step)\n"
END_FREES_GRADIENTS = """    if NEEDS_DV:
        _release(gradients, step)
"""

# Text of the kernel, and what in its place is to fail.
CHANGES = {
    **RING_CHANGES,
    "no-wait-for-the-keys": ("mbarrier.wait(arrived.index(GROUP), 0)", "pass"),
    "bytes-of-no-delta-expected": ("statistics.block_type.nbytes if NEEDS_DK else 0", "0"),
    "queries-not-awaited": ("slot = _await(queries, step)", "slot = step % 2"),
    "gradients-not-awaited": ("at = _await(gradients, step)", "at = 0"),
    "weights-read-before-their-product": ("warpgroup_mma_wait(1 if NEEDS_DK", "warpgroup_mma_wait(2 if NEEDS_DK"),
    "gradients-read-before-their-product": ("wait(1 if NEEDS_DV", "wait(2 if NEEDS_DV"),
    "queries-released-while-they-are-read": (END + END_FREES_QUERIES, END_FREES_QUERIES + END),
    "queries-skipped-and-not-released": (
        "                _await(queries, step)\n                _release(queries, step)",
        "                pass",
    ),
    "gradients-skipped-and-not-released": (
        "                _await(gradients, step)\n                _release(gradients, step)",
        "                pass",
    ),
    "a-tile-skipped-that-is-seen": ("seen = ahead < BLOCK_M", "seen = ahead < 0"),
    "a-tile-not-masked": ("if ahead > 1 - _ROWS", "if ahead > 33 - _ROWS"),
    "a-key-too-many-masked": ("(rows & -8) >=", "(rows & -8) >"),
    "eighths-of-rows-alone-masked": ("keys - (rows & 7)", "keys"),
    "statistics-of-another-head": ("(batch * heads + head) * padded", "(batch * heads + kv_head) * padded"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_simulation_finds_what_is_wrong(name: str) -> None:
    """Each barrier, wait, release and branch is there for something: without it some schedule fails."""
    case = AttentionCase(1, 2, 1, 160, 128, 16, "top_left", dtype=BF16)
    if name == next(iter(CHANGES)):  # as it is, nothing fails
        assert_attention_accurate(case, case.inputs(torch.device("cpu")), run(case, 0))
    assert_some_schedule_fails(run, [case], CHANGES[name], 16)


def test_tiles_for_other_than_two_groups_do_not_compile() -> None:
    """Tuning doubles tiles: two groups more would be waited for, and never come."""
    case = AttentionCase(1, 1, 1, 64, 40, 16, False, dtype=BF16)
    with pytest.raises(SimulationError, match="there are two warp groups, of 64 keys each"):
        run(case, 0, change=("BLOCK_N // _ROWS", "2 * BLOCK_N // _ROWS"))


# With one slot for dO, in launches for dk, dv or both.
CHANGES_APART: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "one-arrival-frees-a-gradient": (
        {},
        ("_barriers(STAGES, CONSUMERS)", "_barriers(STAGES, CONSUMERS if STAGES == 2 else 1)"),
    ),
    "gradients-released-while-they-are-read": (
        {},
        (END + END_FREES_QUERIES + END_FREES_GRADIENTS, END_FREES_GRADIENTS + END + END_FREES_QUERIES),
    ),
    "dk-gradients-released-while-they-are-read": (
        {"needs": (True, False)},
        (MIDDLE + DK_FREES, DK_FREES + MIDDLE),
    ),
    "dk-gradients-released-before-delta-is-read": (
        {"needs": (True, False)},
        (MIDDLE + DK_FREES, MIDDLE.replace("        delta", DK_FREES + "        delta")),
    ),
    "dk-gradients-never-released": (
        {"needs": (True, False)},
        (DK_FREES, ""),
    ),
    "dv-bytes-of-values-expected": (
        {"needs": (False, True)},
        ("mbarrier.expect(barrier, k.block_type.nbytes)", "mbarrier.expect(barrier, 2 * k.block_type.nbytes)"),
    ),
    "dv-bytes-of-delta-expected": ({"needs": (False, True)}, ("if NEEDS_DK else 0", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES_APART)
def test_the_simulation_finds_what_is_wrong_in_a_launch_for_one(name: str) -> None:
    options, change = CHANGES_APART[name]
    case = AttentionCase(1, 2, 1, 160, 128, 16, "top_left", dtype=BF16)
    assert_some_schedule_fails(partial(run, stages_dout=1, **options), [case], change, 16)


def test_calls_that_warp_groups_do_not_serve_get_pointers(device: torch.device) -> None:
    """With tiles for pointers, as in the interpreter; on a GPU, of rows that no descriptor can read."""
    case = AttentionCase(1, 2, 1, 40, 45, 10, "bottom_right", dtype=BF16)
    q, k, v, dout, dlse = case.inputs(device).values()
    options = AttentionOptions(0.3, right=0, bottom_right=True)
    out, lse = attention_forward(q, k, v, *options)
    needs = (True, True, True, False, False)
    configs = (
        select_attention_form(16, BF16, SM_90, "plain", "warp_groups"),
        select_attention_config(16, BF16, target_of(device)),
    )
    found, expected = (
        attention_backward(dout, dlse, q, k, v, out, lse, needs, *options, config=config)
        for config in configs
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_dk_dv_warp_groups_say_what_they_do_not_serve() -> None:
    lse = torch.zeros(1, 1, 8)
    assert dk_dv_warp_groups_reason(lse, 128, SM_90) is None
    assert "sm_90, not for interpreter" in str(dk_dv_warp_groups_reason(lse, 128, INTERPRETER))
    many = lse.expand(1 << 20, 16, 8)
    assert "must be below 2**31" in str(dk_dv_warp_groups_reason(many, 128, SM_90))


@pytest.mark.parametrize(
    ("stages", "widths", "needs_dk", "expected"),
    [(4, (64, 64), True, 4), (4, (128, 128), True, 4), (2, (256, 256), True, 1), (2, (256, 256), False, 2)],
)
def test_slots_for_gradients_fit_shared_memory(
    stages: int, widths: tuple[int, int], needs_dk: bool, expected: int
) -> None:
    from fastattn.kernels.attention_backward_dk_dv_warp_groups import _stages_of_gradients

    tiles = AttentionTiles(64, 128, 4, stages, "warp_groups")
    assert _stages_of_gradients(tiles, *widths, needs_dk, SM_90) == expected
