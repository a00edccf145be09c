"""Reading machine code, occupancy and bounds."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.inspection import machine_code
from benchmarks.inspection.bounds import (
    Work,
    bound_of,
    issue_ms,
    needed_in_flight,
    occupancy,
    programs_per_multiprocessor,
    tile_of,
)
from benchmarks.inspection.cases import DEFAULT_ARCHS, is_telling, shipped_cases
from benchmarks.inspection.in_flight import bytes_in_flight
from benchmarks.inspection.launches import Launch
from benchmarks.inspection.machine_code import MachineCode
from tests.compiling import run_compiling

# A loop in a loop, the inner one twice: without and with a mask. Then the padding behind the last instruction.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/                   MUFU.EX2 R3, R2 ;
        /*0030*/              @P0  BRA 0x10 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0050*/                   FSEL R3, R2, -INF , P1 ;
        /*0060*/                   MUFU.EX2 R3, R2 ;
        /*0070*/             @!P1  BRA `(.L_x_1) 0x40 ;
        /*0080*/               UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0090*/                   STL [R1], R3 ;
        /*00a0*/              @P2  BRA 0x0 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0 ;
        /*00d0*/                   NOP ;
"""


def instructions_of(text):
    return machine_code._parse_sass(machine_code._SASS.findall(text))


def test_sass_is_parsed_without_its_padding():
    operations = [i.operation for i in instructions_of(SASS)]
    assert len(operations) == 12 and operations[-1] == "EXIT"
    assert machine_code._count(operations, "STL") == 1
    assert machine_code._tensor_counts(operations, machine_code._sass_tensor) == {"HGMMA": 2}


def test_kernels_disassembled_at_once_are_read_apart(monkeypatch):
    """Addresses go on from one to the next, and so do the targets of branches."""
    second = re.sub(r"(/\*|0x)([0-9a-f]+)", lambda m: f"{m[1]}{int(m[2], 16) + 0xE0:04x}", SASS).replace(
        "c[0x00e0][0x0108]", "c[0x0][0x28]"
    )
    monkeypatch.setattr(machine_code, "_tool", lambda *arguments: SASS + second)
    code = bytes(0xE0)
    alone = instructions_of(SASS)
    assert machine_code._disassemble("SM90", [code, code]) == [alone, alone]


def test_main_loop_is_the_innermost_and_of_equals_the_one_without_a_mask():
    instructions = instructions_of(SASS)
    loop = machine_code._main_loop(instructions, machine_code._sass_tensor)
    assert [i.operation.partition(".")[0] for i in loop] == ["HGMMA", "MUFU", "BRA"]


def test_a_jump_back_into_a_loop_closes_none():
    """As the wait of a barrier is laid out: what repeats it stands behind the loop, with the products between."""
    text = SASS.replace("@P2  BRA 0x0", "@P2  BRA 0x60")
    for other in ("UP1 UTMALDG.2D [UR8], [UR4]", "STL [R1], R3"):
        text = text.replace(other, "HGMMA R24, gdesc[UR4]")
    loop = machine_code._main_loop(instructions_of(text), machine_code._sass_tensor)
    assert [i.operation.partition(".")[0] for i in loop] == ["HGMMA", "MUFU", "BRA"]


def test_main_loop_without_products_is_the_longest():
    text = SASS.replace("HGMMA", "FADD")
    loop = machine_code._main_loop(instructions_of(text), machine_code._sass_tensor)
    assert "FSEL" in [i.operation for i in loop]
    assert machine_code._main_loop(instructions_of(""), machine_code._sass_tensor) == ()


def test_amd_loops_are_labels():
    text = (
        ".LBB0_1:\n\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1]\n\tv_exp_f32_e32 v1, v2\n"
        "\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
    )
    loop = machine_code._main_loop(machine_code._parse_amd(text), machine_code._amd_tensor)
    assert len(loop) == 3


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    (
        ("sm_90", 32, 4, 0, 16),  # 64 warps
        ("sm_90", 16, 1, 0, 32),  # 32 programs
        ("sm_90", 128, 8, 0, 2),  # 65,536 registers
        ("sm_90", 129, 8, 0, 1),  # given out in units of 8 a thread
        ("sm_90", 32, 4, 100_000, 2),  # 228 KiB, of which each program takes 1 KiB more
        ("sm_86", 32, 4, 0, 12),  # 48 warps
        ("gfx942", 128, 4, 0, 4),  # 512 registers a lane: four waves a SIMD
        ("gfx942", 256, 8, 0, 1),
    ),
)
def test_programs_per_multiprocessor(arch, registers, warps, shared, programs):
    code = MachineCode(registers, 0, 0, 0, shared, warps)
    assert programs_per_multiprocessor(code, arch) == programs
    assert occupancy(code, arch) == programs * warps / {"sm_86": 48, "gfx942": 32}.get(arch, 64)


def test_the_bound_is_the_largest_of_three_times():
    work = Work(flops=989_400_000_000, special=3_865_000_000, bytes=480_000_000, float32=False)
    bound = bound_of(work, "sm_90")  # 1 ms of products, 1 ms of exp2, 0.1 ms of memory
    assert bound.ms == pytest.approx(1.0, rel=1e-3)
    assert "tensor 0.989 TFLOP / 989.4 TFLOP/s = 1 ms" in bound.formula
    assert "memory 0.48 GB / 4800 GB/s = 0.1 ms" in bound.formula
    assert bound_of(replace(work, special=10 * work.special), "sm_90").by == "special"
    assert bound_of(replace(work, float32=True), "sm_90").by == "multiply-add"


def test_work_follows_the_formulas():
    """An MLP's is its two products; views of one packed tensor were once each counted as the whole of it."""
    script = (
        "import torch\n"
        "from benchmarks.inspection import launches_of\n"
        "from benchmarks.inspection.bounds import work_of\n"
        "from benchmarks.cases import AttentionCase, GegluCase, MlpCase\n"
        "bf16 = torch.bfloat16\n"
        "attention = AttentionCase(2, 8, 256, 64, kv_heads=2, causal='top_left', dtype=bf16)\n"
        "for case in (attention, MlpCase(32, 64, 128, dtype=bf16), GegluCase(32, 64, dtype=bf16)):\n"
        "    for launch in launches_of(case, 'sm_90'):\n"
        "        print(launch.name, work_of(launch).flops, work_of(launch).special, work_of(launch).bytes)\n"
    )
    done = run_compiling("-c", script)
    found = [(name, tuple(map(int, rest))) for name, *rest in map(str.split, done.stdout.splitlines())]
    works = dict(found)
    pairs, q, kv, rows = 2 * 8 * 256 * 257 // 2, 2 * 8 * 256 * 64 * 2, 2 * 2 * 256 * 64 * 2, 2 * 8 * 256 * 4
    assert works["attention_forward"] == (4 * 64 * pairs, pairs, 2 * q + 2 * kv + rows)
    assert works["attention_dq"] == (6 * 64 * pairs, pairs, 3 * q + 2 * kv + 2 * rows)
    assert works["attention_dk_dv"] == (8 * 64 * pairs, pairs, 2 * q + 4 * kv + 2 * rows)
    assert works["attention_delta"][:2] == (0, 0)
    forward, backward = (work for name, work in found if name == "linear_activation")
    x, weight, hidden = 32 * 64 * 2, 64 * 128 * 2, 32 * 128 * 2
    product = 2 * 32 * 64 * 128
    assert forward == (product, 32 * 128, x + weight + 128 * 2 + 2 * hidden)
    # One row tile: its column sums are 128 numbers in float32.
    assert backward == (product, 32 * 128, x + weight + 3 * hidden + 128 * 4)
    assert works["gated_forward"] == (0, 32 * 64, 3 * x)
    assert works["gated_backward"] == (0, 32 * 64, 5 * x)


def test_every_operation_is_among_the_shipped_cases():
    operations = {case.operation for case in shipped_cases()}
    norms = {"layer_norm", "rms_norm", "add_layer_norm"}
    others = {"gelu", "bias_gelu", "geglu", "mlp", "rotary", "loss", "attention_e4m3"}
    assert operations == {"attention", *norms, *others}


def test_what_one_architecture_shows_is_compiled_there_alone():
    """Every operation on each; float32 on one, but for the widest heads of gfx942, which has tiles of its own.

    e4m3 is where there are products of it: of these architectures, on sm_90.
    """
    e4m3 = [case for case in shipped_cases() if case.operation == "attention_e4m3"]
    assert {arch for arch in (*DEFAULT_ARCHS, "sm_89") if is_telling(e4m3[0], arch)} == {"sm_89", "sm_90"}
    cases = [case for case in shipped_cases() if case not in e4m3]
    operations = {case.operation for case in cases} - {"rms_norm"}
    for arch in DEFAULT_ARCHS:
        assert {case.operation for case in cases if is_telling(case, arch)} >= operations
    for case in cases:
        archs = {arch for arch in DEFAULT_ARCHS if is_telling(case, arch)}
        assert archs, f"{case.operation} {case.name} is compiled nowhere"
        if case.dtype == torch.float32:
            assert archs == ({"sm_80", "gfx942"} if getattr(case, "head_dim", 0) == 256 else {"sm_80"})
    assert all(is_telling(case, "sm_120") for case in cases)


# The beginning of a pipeline, its loop of two copies, and what follows it.
_PIPELINE = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R64], desc[UR32][R2.64], P5 ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R64+0x10], desc[UR32][R2.64], P5 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R64+0x20], desc[UR32][R2.64] ;
        /*0060*/                   LDGSTS.E [R64+0x30], desc[UR32][R2.64] ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/               @P0 BRA 0x40 ;
        /*0090*/                   DEPBAR.LE SB0, 0x0 ;
        /*00a0*/                   LDG.E.64 R2, desc[UR32][R10.64] ;
"""


@pytest.mark.parametrize(
    ("text", "bytes_"),
    (
        ("LDG.E.128 R4, desc[UR4][R2.64] ;|@P0 LDG.E.128 R8, [R2.64+0x10] ;|FADD R1, R4, R8 ;", 32),
        # Each is waited for before the next one is asked for: by its second register, by one written over it.
        ("LDG.E.128 R4, [R2.64] ;|FADD R1, R5, R1 ;|LDG.E.128 R8, [R2.64] ;", 16),
        ("LDG.E.128 R4, [R2.64] ;|MOV R7, RZ ;|LDG.E.64 R8, [R2.64] ;", 16),
        # Loads come in their order: with the second the first has come.
        ("LDG.E R4, [R2.64] ;|LDG.E R5, [R2.64] ;|FADD R1, R5, R1 ;|LDG.E.64 R6, [R2.64] ;", 8),
        ("LDG.E.U16 R4, [R2.64] ;|LDG.E.U8 R5, [R2.64] ;|LDG.E.64.CONSTANT R6, [R2.64] ;", 11),
        # Addresses and uniform registers of the same number are others.
        ("LDG.E.64 R4, desc[UR4][R2.64] ;|UIADD3 UR4, UR5, UR4 ;|LDG.E.64 R8, [R2.64] ;", 16),
        ("STG.E.128 [R2.64], R4 ;", 0),
    ),
    ids=("both", "second-register", "written-over", "in-order", "narrow", "uniform", "store"),
)
def test_bytes_in_flight(text, bytes_):
    lines = "".join(f"        /*{place:04x}*/ {line}\n" for place, line in enumerate(text.split("|")))
    found = [(i.operation, i.operands) for i in instructions_of(lines)]
    assert bytes_in_flight(found) == bytes_


def test_copies_in_flight_are_those_that_no_barrier_waits_for():
    """Two of 16 bytes before the loop; in it one of these has come, and 20 bytes are asked for."""
    found = [(i.operation, i.operands) for i in instructions_of(_PIPELINE)]
    assert bytes_in_flight(found) == 16 + 20
    assert bytes_in_flight(found[:5]) == 32
    assert bytes_in_flight(found[9:]) == 8


def test_what_a_multiprocessor_needs_in_flight_is_bandwidth_times_latency():
    assert needed_in_flight("sm_90") == pytest.approx(4800e9 * 0.8e-6 / 132)  # 29 KB
    assert needed_in_flight("sm_80") == pytest.approx(2039e9 * 0.6e-6 / 108)  # 11 KB
    # A second of all four schedulers of 132 multiprocessors at 1.83 GHz.
    assert issue_ms(132 * 128 * 1_830_000_000, 1.0, "sm_90") == pytest.approx(1000.0)


def test_elements_are_counted_within_the_sizes():
    def tile(**arguments):
        return tile_of(Launch(None, arguments))

    assert tile(SIZE=3000, BLOCK=1024) == (3000, 1000.0)
    assert tile(ROWS=7, WIDTH=768, BLOCK_M=4, BLOCK_N=1024) == (7 * 768, 3.5 * 768)
    assert tile(ROWS=8, CLASSES=10, BLOCK_M=4, BLOCK_N=16) == (80, 40.0)
    assert tile(ROWS=8, COLUMNS=8, DEPTH=8, BLOCK_M=4, BLOCK_N=4) == (0, 0.0)
    assert tile(SEQ_Q=8) == (0, 0.0)
