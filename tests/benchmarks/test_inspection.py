"""Reading machine code, occupancy, bounds, comparison, and the command `inspect`."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.inspection import command, compare, machine_code
from benchmarks.inspection.bounds import Work, bound_of, occupancy, programs_per_multiprocessor
from benchmarks.inspection.launches import LaunchError
from benchmarks.inspection.machine_code import MachineCode
from benchmarks.inspection.rows import InspectionRow, failures, shipped_cases
from benchmarks.report import make_console
from fastattn.ops import attention

ROOT = Path(__file__).resolve().parents[2]

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


def test_sass_is_parsed_without_its_padding():
    operations = [i.operation for i in machine_code._parse_sass(SASS)]
    assert len(operations) == 12 and operations[-1] == "EXIT"
    assert machine_code._count(operations, "STL") == 1
    assert machine_code._tensor_counts(operations, machine_code._sass_tensor) == {"HGMMA": 2}


def test_main_loop_is_the_innermost_and_of_equals_the_one_without_a_mask():
    instructions = machine_code._parse_sass(SASS)
    loop = machine_code._main_loop(instructions, machine_code._sass_tensor)
    assert [i.operation.partition(".")[0] for i in loop] == ["HGMMA", "MUFU", "BRA"]


def test_main_loop_without_products_is_the_longest():
    text = SASS.replace("HGMMA", "FADD")
    loop = machine_code._main_loop(machine_code._parse_sass(text), machine_code._sass_tensor)
    assert "FSEL" in [i.operation for i in loop]
    assert machine_code._main_loop(machine_code._parse_sass(""), machine_code._sass_tensor) == ()


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


@pytest.fixture(scope="module")
def compiled():
    """Runs a script, or with a list `python -m benchmarks inspect`, where kernels are compiled and not interpreted."""

    def run(what, cwd=ROOT):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(ROOT)
        arguments = (
            ["-c", what] if isinstance(what, str) else ["-m", "benchmarks", "inspect", *map(str, what)]
        )
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run


def test_work_follows_the_formulas(compiled):
    script = (
        "from benchmarks.inspection import launches_of\n"
        "from benchmarks.inspection.bounds import work_of\n"
        "import torch\n"
        "from benchmarks.cases import AttentionCase\n"
        "case = AttentionCase(2, 8, 256, 64, kv_heads=2, causal='top_left', dtype=torch.bfloat16)\n"
        "for launch in launches_of(case, 'sm_90'):\n"
        "    print(launch.name, work_of(launch).flops, work_of(launch).special, work_of(launch).bytes)\n"
    )
    done = compiled(script)
    works = {name: tuple(map(int, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}
    pairs, q, kv, rows = 2 * 8 * 256 * 257 // 2, 2 * 8 * 256 * 64 * 2, 2 * 2 * 256 * 64 * 2, 2 * 8 * 256 * 4
    assert works["attention_forward"] == (4 * 64 * pairs, pairs, 2 * q + 2 * kv + rows)
    assert works["attention_dq"] == (6 * 64 * pairs, pairs, 3 * q + 2 * kv + 2 * rows)
    assert works["attention_dk_dv"] == (8 * 64 * pairs, pairs, 2 * q + 4 * kv + 2 * rows)
    assert works["attention_delta"][:2] == (0, 0)


def test_work_of_an_mlp_is_its_two_products_and_packed_halves_are_counted_once(compiled):
    """Views of one packed tensor were each counted as the whole of it."""
    script = (
        "import torch\n"
        "from benchmarks.inspection import launches_of\n"
        "from benchmarks.inspection.bounds import work_of\n"
        "from benchmarks.cases import GegluCase, MlpCase\n"
        "for case in (MlpCase(32, 64, 128, dtype=torch.bfloat16), GegluCase(32, 64, dtype=torch.bfloat16)):\n"
        "    for launch in launches_of(case, 'sm_90'):\n"
        "        print(work_of(launch).flops, work_of(launch).special, work_of(launch).bytes)\n"
    )
    done = compiled(script)
    forward, backward, _, gated, gated_backward = (
        tuple(map(int, row.split())) for row in done.stdout.splitlines()
    )
    x, weight, hidden = 32 * 64 * 2, 64 * 128 * 2, 32 * 128 * 2
    product = 2 * 32 * 64 * 128
    assert forward == (product, 32 * 128, x + weight + 128 * 2 + 2 * hidden)
    # One row tile: its column sums are 128 numbers in float32.
    assert backward == (product, 32 * 128, x + weight + 3 * hidden + 128 * 4)
    assert gated == (0, 32 * 64, 3 * x) and gated_backward == (0, 32 * 64, 5 * x)


KERNEL = """
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr + offsets, tl.exp2(x * factor), mask=offsets < n)


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK, 2), tl.float32))


def helper(x):
    return x
"""
SIGNATURE = ("x_ptr=*fp32", "y_ptr=*fp32", "n=i32", "factor=fp32", "BLOCK=1024")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own_kernels.py"
    path.write_text(KERNEL)
    return path


def test_a_kernel_of_the_users_own(compiled, own, tmp_path):
    rows = tmp_path / "rows.json"
    arguments = ["--num-warps", 2, "--json", rows, "--signature", *SIGNATURE]
    done = compiled([f"{own}:scale_kernel", "--arch", "sm_90", "gfx942", *arguments])
    assert done.returncode == 0, done.stderr
    hopper, amd = json.loads(rows.read_text())
    assert (hopper["kernel"], hopper["tile"], hopper["num_warps"]) == ("scale", "1024", 2)
    assert hopper["special_functions"] == 16  # 1,024 elements by 64 threads
    assert (hopper["spill_loads"], hopper["spill_stores"], hopper["error"]) == (0, 0, "")
    assert 0 < hopper["registers"] < 128 and hopper["programs"] > 1
    assert amd["special_functions"] == 8  # a warp has 64 threads there
    by_module = compiled(["own_kernels:scale_kernel", "--arch", "sm_90", *arguments], cwd=own.parent)
    assert by_module.returncode == 0, by_module.stderr
    assert json.loads(rows.read_text()) == [hopper]


def test_a_kernel_that_does_not_compile_is_a_row(compiled, own):
    done = compiled([f"{own}:broken_kernel", "--arch", "sm_80", "--signature", "x_ptr=*fp32", "BLOCK=16"])
    assert done.returncode == 1
    assert "user broken: CompilationError: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("signature", "message"),
    (
        (SIGNATURE[:-1], "needs BLOCK in --signature; it takes x_ptr, y_ptr, n, factor, BLOCK"),
        ((*SIGNATURE, "m=i32"), "has no parameter 'm'; it takes x_ptr, y_ptr, n, factor, BLOCK"),
        ((*SIGNATURE[:-1], "BLOCK=i32"), "BLOCK is a constant: give its value, not the type i32"),
        (("x_ptr=*fp33", *SIGNATURE[1:]), "x_ptr=*fp33 is no type; types are fp16, bf16, "),
        (("x_ptr=*fp32:8", *SIGNATURE[1:]), "x_ptr=*fp32:8: only :16 can stand behind a type"),
        (("x_ptr", *SIGNATURE[1:]), "--signature takes NAME=TYPE or NAME=VALUE, not 'x_ptr'"),
    ),
)
def test_a_signature_that_does_not_fit(signature, message, compiled_user_launch, own):
    assert message in compiled_user_launch(f"{own}:scale_kernel", signature)


@pytest.mark.parametrize(
    ("spec", "message"),
    (
        ("{}:helper", "has no triton.jit function 'helper'; it has scale_kernel, broken_kernel"),
        ("nowhere/none.py:kernel", "there is no file nowhere/none.py"),
        ("no_such_module:kernel", "cannot import no_such_module: No module named"),
    ),
)
def test_a_kernel_that_is_not_there(spec, message, compiled_user_launch, own):
    assert message in compiled_user_launch(spec.format(own), SIGNATURE)


@pytest.fixture
def compiled_user_launch(monkeypatch):
    """The error of `user_launch`; the interpreter's stand-in for a kernel is taken for one."""
    from triton.runtime.jit import JITFunction

    from benchmarks.inspection import launches

    def error(spec, signature):
        with monkeypatch.context() as patched, pytest.raises(LaunchError) as raised:
            patched.setattr(launches.triton, "jit", lambda function: JITFunction(function))
            launches.user_launch(spec, signature)
        return str(raised.value)

    return error


REFUSALS = {
    "--arch sm_91": "arch 'sm_91' is unknown; there are sm_75, sm_80, sm_86, sm_89, sm_90, ",
    "softmax": "kernel 'softmax' is unknown; there are attention_forward, attention_delta, ",
    "gelu --shape seq_q=5": "--shape has no 'seq_q' here; there are approximate, dtype, rows, width",
    "gelu --shape rows": "--shape takes NAME=VALUE, not 'rows'",
    "gelu --shape rows=0": "--shape rows=0 must be at least 1",
    "gelu --shape dtype=fp8": "dtype=fp8 is unknown; there are fp32, ",
    "gelu --shape rows=abc": "--shape rows=abc must be a whole number",
    "gelu --shape approximate=linear": "approximate=linear is unknown; there are none, tanh",
    "attention --shape causal=sideways": "causal=sideways is unknown; there are false, true, top_left, ",
    "attention --shape options=bias+speed": "options='bias+speed' must be names joined by '+'; there are window, ",
    "attention --shape head_dim=512": "--shape head_dim=512 must be at most 256",
    "attention --shape kv_heads=3": "--shape kv_heads=3 must divide heads=8",
    ":kernel": "kernel ':kernel' names no module; give module:function or file.py:function",
    "gelu --json /proc": "cannot write results to /proc: Is a directory",
    "gelu --json /proc/none/rows.json": "cannot write results to /proc/none: ",
    "gelu --diff no-such-revision": "cannot read revision no-such-revision: git knows none of this name here",
}


def test_bad_arguments_are_one_line_each(compiled):
    """All in one process, as starting one takes seconds; none of them compiles anything."""
    script = (
        "from benchmarks.__main__ import main\n"
        "from benchmarks.inspection import command\n"
        "command.run_jobs = None\n"
        f"for arguments in {list(REFUSALS)}:\n"
        "    assert main(['inspect', *arguments.split()]) == 2\n"
    )
    done = compiled(script)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("python -m benchmarks: ") for line in done.stderr.splitlines()]
    for line, message in zip(lines, REFUSALS.values(), strict=True):
        assert message in line


def test_the_largest_head_is_that_of_the_operation():
    assert command._MOST_HEAD_DIM == attention._MAX_HEAD_DIM_BACKWARD


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit('used wrongly')", "SystemExit: used wrongly"),
    ),
)
def test_a_file_of_the_users_that_raises_is_one_line(content, message, tmp_path, monkeypatch):
    path = tmp_path / "raising_kernels.py"
    path.write_text(content)
    with pytest.raises(command.InspectError, match=f"cannot import .*:kernel: {message}"):
        command._check_own(f"{path}:kernel", ())


def test_one_shape_of_one_kernel(compiled, tmp_path):
    rows = tmp_path / "rows.json"
    arguments = ["gelu_forward", "--arch", "sm_80", "--shape", "rows=10", "width=7", "dtype=fp16"]
    done = compiled([*arguments, "--json", rows, "--quiet"])
    assert done.returncode == 0 and done.stdout == ""
    (row,) = json.loads(rows.read_text())
    assert (row["case"], row["kernel"]) == ("gelu fp16-erf-10x7", "gelu_forward")
    assert "memory 2.8e-07 GB" in row["bound"]


def test_diff_with_the_commit_itself(compiled):
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    if subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "kernels"]).returncode:
        pytest.skip("kernels/ differs from the commit")
    done = compiled(["gelu_forward", "--arch", "sm_80", "--shape", "rows=10", "--diff", "HEAD", "--quiet"])
    assert done.stdout.strip() == "nothing changed since HEAD", done.stderr


ROW = InspectionRow(
    "case", "sm_90", "kernel", "64", 4, 2, registers=100, shared=1000, shared_limit=9999, instructions=200
)


def test_changes_name_what_differs():
    new = replace(ROW, registers=120, tensor_cores={"HMMA": 4})
    assert compare.changes([ROW], [new]) == [
        "sm_90 case kernel: registers 100 -> 120, tensor_cores {} -> {'HMMA': 4}"
    ]
    assert compare.changes([ROW], [replace(ROW, case="other")]) == [
        "sm_90 case kernel: gone",
        "sm_90 other kernel: new",
    ]
    assert compare.changes([ROW], [ROW]) == []


def test_rows_survive_a_file(tmp_path):
    compare.write_rows(tmp_path / "rows.json", [ROW])
    assert compare.read_rows(tmp_path / "rows.json") == [ROW]


@pytest.mark.parametrize(
    ("change", "grown"),
    (
        ({}, []),
        ({"registers": 105, "instructions": 210}, []),  # a compiler moves a few instructions about
        ({"registers": 106}, ["sm_90/case/kernel: registers grew from 100 to 106"]),
        ({"spill_loads": 1}, ["sm_90/case/kernel: spill_loads grew from 0 to 1"]),
        ({"shared": 1001}, ["sm_90/case/kernel: shared grew from 1000 to 1001"]),
        ({"case": "new"}, ["sm_90/new/kernel is not in the baseline; --update-baseline adds it"]),
    ),
)
def test_growth_past_the_baseline(change, grown, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    assert compare.growth([replace(ROW, **change)], compare.BASELINE) == grown


def test_another_compilers_baseline_is_no_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    assert compare.why_unchecked() is None
    of = compare.triton.__version__
    monkeypatch.setattr(compare.triton, "__version__", "9.9.9")
    assert compare.growth([replace(ROW, registers=255)], compare.BASELINE) == []
    assert compare.why_unchecked() == f"growth not checked: the baseline is of Triton {of}"
    compare.BASELINE.unlink()
    with pytest.raises(
        compare.ComparisonError, match="cannot read the baseline, which --update-baseline writes"
    ):
        compare.why_unchecked()


def test_the_check_says_when_growth_was_not_checked(tmp_path, monkeypatch, capsys):
    """With another Triton `--check` passed whatever had grown, and nothing said so."""
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    monkeypatch.setattr(compare.triton, "__version__", "9.9.9")
    monkeypatch.setattr(command, "run_jobs", lambda jobs: [ROW])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.inspect(parser.parse_args(["--check", "--quiet"]), [], make_console(), None) == 0
    assert "growth not checked: the baseline is of Triton" in capsys.readouterr().out


def test_failures_of_a_shipped_kernel():
    rows = [
        ROW,
        replace(ROW, spill_stores=2),
        replace(ROW, shared_limit=999),
        replace(ROW, tensor_cores={"HMMA": 1}, bound="tensor 1 TFLOP"),
        replace(ROW, bound="H200: tensor 1 TFLOP", bound_by="tensor"),
        replace(ROW, error="OutOfResources: shared"),
    ]
    found = [line.removeprefix("sm_90 case kernel: ") for line in failures(rows)]
    assert found == [
        "spills, 0 loads and 2 stores",
        "shared memory 1000 is above 999 bytes",
        "HMMA on sm_90, whose fast matrix instruction is HGMMA",
        "16-bit products without tensor cores",
        "OutOfResources: shared",
    ]


def test_every_operation_is_among_the_shipped_cases():
    operations = {case.operation for case in shipped_cases()}
    norms = {"layer_norm", "rms_norm", "add_layer_norm"}
    assert operations == {"attention", *norms, "gelu", "bias_gelu", "geglu", "mlp", "rotary", "loss"}
