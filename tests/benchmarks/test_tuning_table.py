"""The table that is written, and what a run leaves behind."""

import ast
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.cases import AttentionCase
from benchmarks.report import make_console
from benchmarks.tuning import report, table
from benchmarks.tuning.plan import plan
from benchmarks.tuning.resume import read_results, result_of
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._config import measured_configs
from fastattn.kernels._measured import MEASURED, RUNS
from fastattn.kernels._norm_config import select_norm_backward_config
from fastattn.kernels._pointwise_config import GeluConfig, select_gelu_config
from fastattn.kernels._target import KNOWN_TARGETS
from tests.benchmarks.tuning_on_nothing import BF16, DESCRIBED, H200, composite, loaded, winner

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_is_python_that_ruff_accepts_and_configs_come_from(tmp_path):
    attention = plan([AttentionCase(1, 2, 128, 128, dtype=BF16)], H200, ["attention"])[0]
    entered = replace(winner(), select=attention.select, key=attention.key, config=asdict(attention.config))
    results = [winner(), composite(), entered, replace(winner(), key=("sm_80", 32, 1))]
    text = table.render(*table.merged({}, {}, results, DESCRIBED | {"device": 'NVIDIA "H200" \\'}))
    path = tmp_path / "_measured.py"
    table.write(text, path)
    assert [path.name for path in tmp_path.iterdir()] == ["_measured.py"]
    written = loaded(path)
    assert list(written.MEASURED) == sorted(written.MEASURED)
    with measured_configs(written.MEASURED, written.RUNS):
        assert asdict(select_gelu_config(torch.float32, 1, H200)) == results[0].config
        assert select_gelu_config(torch.float32, 1, KNOWN_TARGETS["sm_86"]) == GeluConfig(1024, 4)
        backward = select_norm_backward_config(1024, 16, [BF16] * 3, False, H200)
        assert asdict(backward) == results[1].config and backward.programs == 1056
        assert select_attention_config(128, BF16, H200) == attention.config
    entry = written.MEASURED["select_gelu_config"]["sm_90", 32, 1]
    assert entry.ms < entry.replaced_ms and entry.cases == ("gelu fp32-erf-64x64",)
    run = written.RUNS[entry.run]
    assert (run.torch, run.triton, run.date) == ("2.13.0", "3.7.1", "2026-01-02")
    assert (run.commit, run.multiprocessors) == ("0123456789ab", 132)
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_shipped_file_is_what_would_be_written_of_it():
    assert table.PATH.read_text() == table.render(MEASURED, RUNS)
    names = [
        node.module for node in ast.parse(table.PATH.read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    assert names == ["__future__", "typing", "fastattn.kernels._measurement"]


def test_entries_of_other_keys_stay_and_runs_that_nothing_names_go():
    first, first_runs = table.merged({}, {}, [winner(), composite()], DESCRIBED)
    again = DESCRIBED | {"commit": "fedcba987654", "dirty": True}
    second, runs = table.merged(first, first_runs, [winner()], again)
    assert list(runs) == [
        "NVIDIA H200, 2026-01-02, 0123456789ab",
        "NVIDIA H200, 2026-01-02, fedcba987654 with changes",
    ]
    assert second["select_norm_backward_config"] == first["select_norm_backward_config"]
    third, runs = table.merged(second, runs, [composite()], again)
    assert len(runs) == 1 and len(third) == 2
    kept = table.merged(first, first_runs, [replace(winner(), config=None)], again)
    assert kept == (first, first_runs)
    changes = table.diff(table.render(first, first_runs), table.render(second, runs))
    assert changes.startswith("--- a/kernels/_measured.py\n+++ b/kernels/_measured.py\n@@ ")
    assert table.diff(table.render(first, first_runs), table.render(*kept)) == ""


def test_the_report_has_the_table_the_samples_and_the_diff(tmp_path, capsys, monkeypatch):
    path = tmp_path / "_measured.py"
    path.write_text(table.render({}, {}))
    monkeypatch.setattr(table, "PATH", path)
    monkeypatch.setattr(table.write, "__defaults__", (path,))
    result = winner()
    arguments = ([result], ["rotary 64 0"], DESCRIBED, tmp_path, make_console())
    report.report(*arguments, False)
    printed = capsys.readouterr().out
    assert (
        "block=1024 num_warps=4" in printed
        and "entered" in printed
        and "+++ b/kernels/_measured.py" in printed
    )
    assert "not tuned, as time was over: rotary 64 0" in printed
    assert path.read_text() == table.render({}, {})
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert result_of(written["results"][0]) == result and written["environment"]["device"] == "NVIDIA H200"
    assert (tmp_path / "tuning.diff").read_text().startswith("--- a/kernels/_measured.py")
    report.report(*arguments, True)
    assert loaded(path).MEASURED["select_gelu_config"]["sm_90", 32, 1].config == result.config
    assert read_results(tmp_path / "none.jsonl", {}) == []
