"""`python -m benchmarks tune`: interrupted, out of time, refused, and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks import __main__ as commands
from benchmarks.cases import GeluCase, LayerNormCase
from benchmarks.tuning import command, report
from benchmarks.tuning.options import TuneError
from benchmarks.tuning.plan import plan, tuning_cases
from fastattn.kernels._pointwise_config import GeluConfig
from tests.benchmarks.tuning_on_nothing import BACKWARD, DESCRIBED, GELU, H200, options, run

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_resumed_where_it_was_cut_off(tmp_path):
    tasks = [GELU, BACKWARD]
    searched, first, late = run(tmp_path, tasks[:1], options("--out", str(tmp_path)))
    assert searched == [GELU.label] and late == []
    searched, results, _ = run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))
    assert searched == [BACKWARD.label]
    assert results[0] == first[0] and results[0].config is not None
    searched, again, _ = run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))
    assert searched == [] and again == results
    with (tmp_path / "tuning.jsonl").open("a") as file:
        file.write('{"select": "cut off')
    assert run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))[0] == []
    with pytest.raises(TuneError, match=r"was measured with commit 0123456789ab, and this is other"):
        run(tmp_path, tasks, options("--resume"), DESCRIBED | {"commit": "other"})
    with pytest.raises(TuneError, match="measured with rounds 40, and this is 9"):
        run(tmp_path, tasks, options("--resume", "--rounds", "9"))


def test_time_that_is_over_leaves_the_rest(tmp_path):
    searched, results, late = run(tmp_path, [GELU, BACKWARD], options("--minutes", "1e-9"))
    assert (searched, results, late) == ([], [], [GELU.label, BACKWARD.label])


def test_an_error_is_one_keys_result(tmp_path):
    def cost(config):
        if isinstance(config, GeluConfig):
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    _, results, _ = run(tmp_path, [GELU, BACKWARD], options(), cost=cost)
    assert results[0].config is None and len(results) == 2 and results[1].parts
    assert any("no memory" in line for line in report.dropped_lines(results))


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("", "PyTorch finds no GPU here, and timing needs one; --dry-run --arch sm_90 compiles without"),
        ("--dry-run --arch sm_91", "--arch 'sm_91' is unknown; there are sm_75, "),
        (
            "--dry-run --kernels softmax",
            "kernel 'softmax' is unknown; there are norm_forward, norm_backward, gelu",
        ),
        ("--dry-run --write", "--dry-run times nothing: there is nothing to write"),
        ("--arch sm_80", "--arch sm_80 is for --dry-run"),
        ("--rounds 1", "--rounds 1 must be at least 5"),
        ("--minutes 0", "--minutes 0 must be above 0"),
        ("--resume", "--resume needs --out DIR"),
        ("--jobs 0", "--jobs 0 must be at least 1"),
    ),
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_cannot_be_tuned_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "tuning_cases", lambda: [LayerNormCase(64, 64), GeluCase(64, 64)])
    assert commands.main(["tune", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"python -m benchmarks: {message}") and err.count("\n") == 1


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("fastattn.dispatch.INTERPRETING", True)
    assert commands.main(["tune", "--dry-run"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_another_runs_folder_is_not_written_to(tmp_path):
    (tmp_path / "tuning.jsonl").write_text("{}\n")
    with pytest.raises(TuneError, match="holds a run: give --resume"):
        command._folder(options("--out", str(tmp_path)))
    assert command._folder(options("--out", str(tmp_path), "--resume")) == tmp_path


def test_a_dry_run_compiles_every_candidate(tmp_path):
    """Really, for a GPU that is not there, in another process, as the interpreter takes the compiler's place here."""
    script = (
        "from benchmarks.__main__ import main\n"
        "from benchmarks.cases import GeluCase\n"
        "from benchmarks.tuning import command\n"
        "command.tuning_cases = lambda: [GeluCase(8192, 4096, 'tanh')]\n"
        f"raise SystemExit(main('tune --dry-run --arch sm_80 --jobs 1 --candidates 3 --out {tmp_path}'.split()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "candidates as compiled for sm_80" in done.stdout and "block=2048 num_warps=4" in done.stdout
    found = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert found[0]["config"] == {"block": 1024, "num_warps": 4} and len(found) == 8
    # A key's candidates change its own kernel alone.
    kernels = {candidate["task"]: {row["kernel"] for row in candidate["rows"]} for candidate in found}
    assert kernels == {"gelu 32 1": {"gelu_forward"}, "gelu 32 2": {"gelu_backward"}}
    for candidate in found:
        for row in candidate["rows"]:
            assert 8 < row["registers"] < 256 and row["error"] == "" and row["spill_loads"] == 0


def test_a_key_that_time_cut_short_is_searched_again_and_kept_until_then(tmp_path):
    chosen = options("--out", str(tmp_path), "--resume", "--minutes", "1e-9")
    with pytest.MonkeyPatch.context() as patched:
        # Time for the first part alone: what asks whether it is over is asked before each task and part.
        times = iter([0.0, 0.0])
        patched.setattr(command.time, "monotonic", lambda: next(times, 1e9))
        _, first, late = run(tmp_path, [BACKWARD], chosen)
    assert first[0].unfinished and late == [f"{BACKWARD.label} row_means, sums, programs"]
    searched, kept, _ = run(tmp_path, [BACKWARD], chosen)
    assert searched == [] and kept == first
    searched, again, late = run(tmp_path, [BACKWARD], options("--out", str(tmp_path), "--resume"))
    assert searched == [BACKWARD.label] and late == []
    assert [result.unfinished for result in again] == [()]
    assert run(tmp_path, [BACKWARD], chosen)[1] == again


def test_the_most_telling_keys_come_first():
    """Attention's at 128 and 64 features, of 16 bits and plain scores: a GPU's time may end with these."""
    tasks = plan(tuning_cases(), H200)
    assert [task.key[1:] for task in tasks[:2]] == [(16, 128, "plain"), (16, 64, "plain")]
    assert {task.select for task in tasks[:2]} == {"select_attention_config"}
