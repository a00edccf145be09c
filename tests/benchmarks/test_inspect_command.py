"""The command `inspect`: kernels of the user's own, one shape, a difference, and arguments that do not fit."""

import argparse
import json
import subprocess
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.inspection import command
from benchmarks.inspection.launches import LaunchError
from fastattn.ops import _attention_triton
from tests.compiling import ROOT, run_compiling, run_inspect

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


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_kernels.py"
    path.write_text(KERNEL)
    return path


def test_what_is_compiled(own, tmp_path):
    """Kernels of the user's own, by file and by module, one that does not compile, and one shape of a shipped one.

    All in one process, as starting one takes seconds.
    """
    options = f"--quiet --num-warps 2 --signature {' '.join(SIGNATURE)}"
    found = inspected(
        tmp_path,
        f"own_kernels:scale_kernel --arch sm_90 {options}",  # before the other puts it among the modules
        f"{own}:scale_kernel --arch sm_90 gfx942 {options}",
        f"{own}:broken_kernel --arch sm_80 --signature x_ptr=*fp32 BLOCK=16",
        "gelu_forward --arch sm_80 --quiet --shape rows=10 width=7 dtype=fp16",
    )
    by_module, (hopper, amd), (broken,), (gelu,) = (rows for _, _, rows in found)
    assert [(code, said == "") for code, said, _ in found] == [(0, True), (0, True), (1, False), (0, True)]
    assert (hopper["kernel"], hopper["tile"], hopper["num_warps"]) == ("scale", "1024", 2)
    assert hopper["special_functions"] == 16  # 1,024 elements by 64 threads
    assert (hopper["spill_loads"], hopper["spill_stores"], hopper["error"]) == (0, 0, "")
    assert 0 < hopper["registers"] < 128 and hopper["programs"] > 1
    assert amd["special_functions"] == 8  # a warp has 64 threads there
    assert by_module == [hopper]
    assert broken["error"].startswith("CompilationError: ")
    assert "user broken: CompilationError: " in found[2][1]
    assert (gelu["case"], gelu["kernel"]) == ("gelu fp16-erf-10x7", "gelu_forward")
    assert "memory 2.8e-07 GB" in gelu["bound"]


def inspected(folder, *commands):
    """(exit status, standard output, rows) of each command, all in one process in this folder."""
    script = (
        "import contextlib, io, json, sys\n"
        "from benchmarks.__main__ import main\n"
        "found = []\n"
        f"for arguments in {commands!r}:\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said):\n"
        "        code = main(['inspect', *arguments.split(), '--jobs', '1', '--json', 'rows.json'])\n"
        "    found.append((code, said.getvalue(), json.load(open('rows.json'))))\n"
        "json.dump(found, sys.stdout)\n"
    )
    done = run_compiling("-c", script, cwd=folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


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
    "gelu --jobs 0": "--jobs 0 must be at least 1",
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


def test_bad_arguments_are_one_line_each():
    """All in one process, as starting one takes seconds; none of them compiles anything."""
    script = (
        "from benchmarks.__main__ import main\n"
        "from benchmarks.inspection import command\n"
        "command.run_jobs = None\n"
        f"for arguments in {list(REFUSALS)}:\n"
        "    assert main(['inspect', *arguments.split()]) == 2\n"
    )
    done = run_compiling("-c", script)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("python -m benchmarks: ") for line in done.stderr.splitlines()]
    for line, message in zip(lines, REFUSALS.values(), strict=True):
        assert message in line


@pytest.mark.parametrize(("options", "count"), (("", 3), ("--every-case", 6), ("--shape rows=5", 2)))
def test_cases_that_another_stands_for_are_left_out(options, count, monkeypatch):
    """Three shipped cases of gelu: of the exact one in bf16 on both, of tanh on sm_90, of float32 on sm_80."""
    monkeypatch.setattr(command, "known_kernels", lambda: ["gelu_forward"])
    launch = SimpleNamespace(name="gelu_forward")
    launches = lambda case, arch: [launch] if case.operation == "gelu" else []  # noqa: E731
    monkeypatch.setattr(command, "launches_of", launches)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    chosen = parser.parse_args(["gelu", "--arch", "sm_80", "gfx942", *options.split()])
    assert len(command.plan(chosen)) == count


def test_the_largest_head_is_that_of_the_operation():
    assert command._MOST_HEAD_DIM == _attention_triton._MAX_HEAD_DIM_BACKWARD


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


def test_diff_with_the_commit_itself():
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    if subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "kernels"]).returncode:
        pytest.skip("kernels/ differs from the commit")
    done = run_inspect("gelu_forward", "--arch", "sm_80", "--shape", "rows=10", "--diff", "HEAD", "--quiet")
    assert done.stdout.strip() == "nothing changed since HEAD", done.stderr
