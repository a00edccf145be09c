"""What is tuned, and with which candidates."""

import ast
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.cases import AttentionCase, AttentionE4M3Case, LayerNormCase, RotaryCase
from benchmarks.inspection.cases import launches_of, shipped_cases
from benchmarks.tuning import spaces
from benchmarks.tuning.compiling import Compilation, distinct
from benchmarks.tuning.plan import plan, tuning_cases
from fastattn.kernels import _config
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import FORMS, select_attention_form
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._config import forced_config, measured_configs
from fastattn.kernels._linear_config import LinearConfig, select_linear_config
from fastattn.kernels._measurement import Measured, Run
from fastattn.kernels._norm_config import select_norm_backward_config, select_norm_forward_config
from fastattn.kernels._pointwise_config import GeluConfig, select_gelu_config
from fastattn.kernels._rotary_config import RotaryConfig, select_rotary_config
from fastattn.kernels._target import KNOWN_TARGETS
from tests.benchmarks.tuning_on_nothing import BF16, H200


def test_candidates_are_the_nearest_of_the_same_config():
    config = select_norm_forward_config(4096, 16, BF16, False, H200)
    tried = spaces.candidates(config, "tile", H200, 4096)
    assert config not in tried and len(set(tried)) == len(tried)
    assert {replace(config, block_m=2), replace(config, num_warps=8), replace(config, num_stages=3)} <= set(
        tried
    )
    assert all(new.block_n in (2048, 4096) for new in tried)  # wider than a row is of no use
    assert {new.num_warps for new in tried} == {4, 8, 16}
    changed = [
        sum(a != b for a, b in zip(asdict(new).values(), asdict(config).values(), strict=True))
        for new in tried
    ]
    assert changed[0] == 1 and changed[-1] > 2
    hip = spaces.candidates(GeluConfig(1024, 2), "tile", KNOWN_TARGETS["gfx942"])
    assert {new.num_warps for new in hip} == {2, 4, 8}


def test_parts_of_configs_of_several_kernels():
    backward = select_norm_backward_config(1024, 16, [BF16] * 2, False, H200)
    assert spaces.parts(backward) == ["walk", "row_means", "sums", "programs"]
    assert [new.programs for new in spaces.candidates(backward, "programs", H200)] == [132, 528]
    walks = spaces.candidates(backward, "walk", H200, 1024)
    assert all(replace(new, walk=backward.walk) == backward for new in walks) and len(walks) > 8
    assert spaces.parts(select_linear_config(BF16, H200)) == ["tile", "group_m"]
    assert spaces.parts(select_gelu_config(BF16, 1, H200)) == ["tile"]
    attention = select_attention_config(128, BF16, H200)
    assert {"forward", "dq", "dk_dv", "separate_dk_dv", "delta", "dbias"} <= set(spaces.parts(attention))
    assert "reduce_dq" not in spaces.parts(attention)  # whose gradients are not the same on every run
    (turned,) = spaces.candidates(attention, "separate_dk_dv", H200)
    assert turned == replace(attention, separate_dk_dv=not attention.separate_dk_dv)


def test_fields_that_are_new_are_tuned_by_their_type():
    @dataclass(frozen=True)
    class NewTiles(AttentionTiles):
        descriptors: bool = False
        word: str = "kept"

    @dataclass(frozen=True)
    class NewConfig:
        forward: NewTiles
        persistent: bool = True
        limit: int | None = None

    config = NewConfig(NewTiles(64, 64, 4, 2))
    assert spaces.parts(config) == ["forward", "persistent"]
    tried = spaces.candidates(config, "forward", H200)
    assert replace(config, forward=replace(config.forward, descriptors=True)) in tried
    assert {new.forward.word for new in tried} == {"kept"}
    assert "descriptors=False" in spaces.label(config, "forward")


def test_candidates_keep_what_kernels_need():
    for pairs, target in ((64, H200), (1, H200), (64, KNOWN_TARGETS["gfx942"])):
        config = select_rotary_config(pairs, 0, BF16, target)
        threads = 64 if target.backend == "hip" else 32
        for new in spaces.candidates(config, "tile", target):
            assert isinstance(new, RotaryConfig) and new.block_d == config.block_d and new.block_rest == 0
            assert new.block_m * new.block_d >= threads * new.num_warps
    # A thread a pair already.
    tried = spaces.candidates(RotaryConfig(2, 64, 0, 4, 4096), "tile", H200)
    assert tried and all(new.block_m * 64 >= 32 * new.num_warps for new in tried)
    for config in (LinearConfig(32, 32, 16, 8, 4, 2, 2), select_linear_config(BF16, H200)):
        for new in spaces.candidates(config, "tile", H200):
            assert min(new.block_m, new.block_k, new.block_n // new.pieces) >= 16
    attention = select_attention_config(256, BF16, H200, "heavy")
    for part in ("forward", "dq", "dk_dv"):
        tiles = [getattr(new, part) for new in spaces.candidates(attention, part, H200)]
        assert min(min(t.block_m, t.block_n) for t in tiles) == 16
    assert all(new.delta.block_n == 0 for new in spaces.candidates(attention, "delta", H200))


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "gfx942"))
def test_every_function_has_tasks_and_candidates(arch):
    target = KNOWN_TARGETS[arch]
    cases = [case for case in tuning_cases() if getattr(case, "seq_q", 1) in (1, 4096)]
    tasks = plan(cases, target)
    assert {task.select for task in tasks} == set(_config._overrides)
    for task in tasks:
        assert 1 <= len(task.cases) <= 2 and task.key[0] == arch
        with forced_config(task.select, task.config):
            pass
        parts = spaces.parts(task.config)
        assert parts and all(
            spaces.candidates(task.config, part, target, task.columns, task.starts) for part in parts
        ), task.label


def test_a_plan_is_of_the_gpu_at_hand():
    """Its multiprocessors, which programs follow, need not be those of the architecture's best-known GPU."""
    small = replace(H200, multiprocessors=78)
    (task,) = plan([LayerNormCase(64, 1024, dtype=BF16)], small, ["norm_backward"])
    assert task.config == select_norm_backward_config(1024, 16, [BF16] * 2, False, small)
    assert KNOWN_TARGETS["sm_90"] is H200


@pytest.mark.parametrize(
    ("arch", "options", "served"),
    (("sm_90", "", FORMS), ("sm_90", "dropout", ("pointers",)), ("sm_80", "", ("pointers",))),
    ids=("sm_90", "dropout", "sm_80"),
)
def test_attentions_forms_are_candidates_where_they_have_tiles(arch, options, served):
    """Driven by FORMS: a new one is tried as soon as `form_reason` has nothing against it."""
    target = KNOWN_TARGETS[arch]
    case = AttentionCase(2, 4, 256, 128, causal="top_left", dtype=BF16, options=options)
    (task,) = plan([case], target, ["attention"])
    tried = [new.forward for new in spaces.candidates(task.config, "forward", target, None, task.starts)]
    # The loops of "reduction" get their rows by descriptors.
    assert {tiles.form for tiles in tried[:24]} == set(served) - {"reduction"}
    assert len(set(tried)) == len(tried) and task.config.forward not in tried
    for form in served:
        start = select_attention_form(128, BF16, target, "plain", form).forward
        assert start == task.config.forward or start in tried[:24] or options
    # Its warps are the compiler's to divide, and so is its mask.
    assert all((t.num_warps, t.one_loop) == (4, False) for t in tried if t.form == "specialized")
    for new in spaces.candidates(task.config, "forward", target, None, task.starts):
        assert replace(new, forward=task.config.forward) == task.config
        assert f"form={new.forward.form}" in spaces.label(new, "forward")


def test_every_form_is_a_candidate_again_where_another_was_measured():
    """Also the one that ships; operands of e4m3 have no forms."""
    target = KNOWN_TARGETS["sm_90"]
    measured = select_attention_form(128, BF16, target, "plain", "descriptors")
    entry = Measured(asdict(measured), 1.0, 1.2, ("a case",), "a run")
    run = Run("an H200", target.multiprocessors, "", "", "", "")
    table = {"select_attention_config": {("sm_90", 16, 128, "plain"): entry}}
    case = AttentionCase(2, 4, 256, 128, causal="top_left", dtype=BF16)
    with measured_configs(table, {"a run": run}):
        (task,) = plan([case], target, ["attention"])
        assert task.config == measured
        tried = [new.forward for new in spaces.candidates(task.config, "forward", target, None, task.starts)]
    assert select_attention_config(128, BF16, target).forward in tried[:24]
    (task,) = plan([AttentionE4M3Case(2, 4, 256, 128)], target, ["attention"])
    assert task.key[1] == 8 and task.starts == ()


def test_attention_on_e4m3_operands_is_tuned_where_there_are_products_of_them():
    """In the forms that read by pointers, with tiles whose keys are whole in a block that shares a scale."""
    cases = [case for case in tuning_cases() if case.operation == "attention_e4m3"]
    assert not plan(cases, KNOWN_TARGETS["sm_80"]) and not plan(cases, KNOWN_TARGETS["gfx942"])
    tasks = plan(cases, H200, ["attention"])
    assert {task.key[1:] for task in tasks} == {(8, width, "plain") for width in (64, 128, 256)}
    for task in tasks:
        assert task.starts == ()
        tried = spaces.candidates(task.config, "forward", H200, None, task.starts)
        jobs = [Compilation("sm_90", task.select, task.config, new, task.cases, task.key) for new in tried]
        found, kernels = distinct(jobs)
        assert kernels == {"attention_forward", "quantize_keys"}
        launched = [job for job in found if job.candidate.forward.block_n in (32, 64, 128)]
        refused = [job for job in found if job not in launched]
        assert launched and all(job.changed() for job in launched)
        for job in refused:
            (compiled,) = job.run()
            assert "must be 32, 64 or 128 with e4m3" in compiled.row.error


def test_the_limit_of_registers_is_a_choice_on_nvidias():
    config = select_norm_forward_config(16384, 16, BF16, False, H200)
    assert config.registers == 64
    assert {new.registers for new in spaces.candidates(config, "tile", H200, 16384)} == {None, 64, 128}
    amd = KNOWN_TARGETS["gfx942"]
    config = select_norm_forward_config(4096, 16, BF16, False, amd)
    assert {new.registers for new in spaces.candidates(config, "tile", amd, 4096)} == {None}


# What no config is chosen for, and why.
_FIXED = {
    "reduce_losses": "one program, which adds up one number a row",
    **dict.fromkeys(
        ("quantize_statistics", "quantize_keys", "quantize_queries"),
        "one pass through memory each: the rows of a program follow from their width",
    ),
}

# What no call launches by itself, and what reads it instead.
_BY_NAME = {
    "attention_forward_warp_groups": "tests/kernels/test_attention_warp_groups_code.py",
    "attention_dq_warp_groups": "tests/kernels/test_attention_dq_warp_groups_code.py",
    "attention_dk_dv_warp_groups": "tests/kernels/test_attention_backward_warp_groups_code.py",
    "attention_statistics": "tests/kernels/test_attention_backward_warp_groups_code.py",
}


def test_every_kernel_can_be_tuned_and_read():
    """Each is launched by a shipped case of the inspector, and a candidate of some key changes its launch."""
    kernels = {
        node.name.strip("_").removesuffix("_kernel")
        for path in (Path(__file__).resolve().parents[2] / "kernels").glob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    kernels -= set(_BY_NAME)
    assert kernels == {launch.name for case in shipped_cases() for launch in launches_of(case, "sm_90")}
    changed: set[str] = set()
    wide = LayerNormCase(64, 32768, dtype=BF16)
    biased = AttentionCase(2, 4, 256, 64, causal="top_left", dtype=BF16, options="bias")
    decode = AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=32768, dtype=BF16)
    for task in plan([*shipped_cases()[-14:], wide, biased, decode], H200):
        for part in spaces.parts(task.config):
            tried = spaces.candidates(task.config, part, H200, task.columns, task.starts)
            jobs = (
                Compilation("sm_90", task.select, task.config, new, task.cases, task.key) for new in tried
            )
            changed |= distinct(jobs, 2)[1]
    assert changed - set(_BY_NAME) == kernels - set(_FIXED)


def test_the_programs_of_a_rotation_are_a_part_of_its_config():
    """More of them take fewer heads each: another launch of the same tile."""
    (task,) = plan([RotaryCase(4, 32, 4096, 128, dtype=BF16)], H200, ["rotary"])
    tried = spaces.candidates(task.config, "programs", H200)
    jobs = (Compilation("sm_90", task.select, task.config, new, task.cases, task.key) for new in tried)
    groups = [launch.arguments["GROUP"] for job in distinct(jobs)[0] for _, launch in job.changed().values()]
    assert len(set(groups)) == 2
