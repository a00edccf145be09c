"""Rows on disk, tables, plots: written, read back, and honest about what did not run."""

import csv
import io
import json
import math
import subprocess

import pytest
import torch
from rich.console import Console

from benchmarks import environment as environment_module
from benchmarks import plots, report
from benchmarks.environment import environment, row_environment

ROW = {
    "operation": "gelu",
    "case": "fp32-erf-8x8",
    "direction": "forward",
    "provider": "torch",
    "status": "ok",
    "median_ms": 1.234567,
    "low_ms": 1.2,
    "high_ms": 1.3,
    "rounds": 5,
    "tflops": 0.5,
    "gbytes_per_s": 12.0,
    "peak_mib": 3.0,
    "time_vs_torch": 1.0,
    "time_vs_torch_low": 0.9,
    "time_vs_torch_high": 1.1,
}
ABSENT = {key: ROW[key] for key in ("operation", "case", "direction")} | {
    "provider": "sdpa-flash",
    "status": "absent",
    "reason": "a GPU's back end [cpu]",
}
HOST = {
    "operation": "host",
    "case": "gelu",
    "status": "ok",
    "median_us": 5.0,
    "low_us": 4.0,
    "high_us": 6.0,
    "torch_us": 2.0,
    "above_torch_us": 3.0,
    "above_torch_low_us": 2.0,
    "above_torch_high_us": 4.0,
    "bound_us": 15.0,
}
IMPORT = {
    "operation": "import",
    "status": "ok",
    "median_s": 0.05,
    "low_s": 0.04,
    "high_s": 0.06,
    "torch_s": 1.5,
    "bound_s": 0.3,
    "imports_triton": False,
}


def printed(rows):
    console = Console(width=170, file=io.StringIO())
    report.print_rows(rows, console)
    return console.file.getvalue()


def test_rows_are_on_disk_as_they_come(tmp_path):
    writer = report.RowWriter(tmp_path / "rows.jsonl", {"device": "x"})
    writer.write(ROW)
    assert report.read_rows(writer.path) == [ROW | {"device": "x"}]
    writer.write(ABSENT)
    assert report.read_rows(writer.path) == writer.rows == [ROW | {"device": "x"}, ABSENT | {"device": "x"}]


def test_a_row_cut_short_by_an_interruption_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + '\n{"operation": "ge')
    assert report.read_rows(path) == [ROW]


def test_csv_has_a_column_for_every_key(tmp_path):
    report.write_csv(tmp_path / "rows.csv", [ROW, ABSENT])
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["median_ms"]) == ROW["median_ms"]
    assert first["reason"] == ""
    assert second["reason"] == ABSENT["reason"]


def test_json_has_null_for_what_json_cannot_hold(tmp_path):
    report.write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (1,)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [1]}}


def test_table_shows_figures_and_absences():
    text = printed([ROW, ABSENT, HOST, IMPORT])
    assert "1.23" in text and "1.20-1.30" in text and "1.00 [0.90, 1.10]" in text
    assert "gelu sdpa-flash: absent in 1 row: a GPU's back end [cpu]" in text
    assert "import fastattn adds 0.050 s (quartiles 0.0400-0.0600) to import torch (1.50 s)" in text
    assert "Triton is not imported" in text
    assert "3.00" in text and "over" not in text


def test_what_a_reader_must_know_of_a_time_stands_below_the_table():
    console = Console(width=200, file=io.StringIO())
    noted = ROW | {"provider": "liger", "note": "its time holds a copy"}
    report.print_rows([ROW, noted, noted | {"case": "other"}, ROW | {"waits_for_device": True}], console)
    text = console.file.getvalue()
    assert text.count("gelu liger, forward: its time holds a copy") == 1
    assert text.count("gelu torch, forward: it waits for the device") == 1


def test_host_cost_over_its_bound_is_marked():
    assert "16.00 (2.0-4.0) over" in printed([HOST | {"above_torch_us": 16.0}])
    assert "over" not in printed([HOST | {"above_torch_us": 16.0, "bound_us": None}])


@pytest.mark.parametrize(
    ("value", "text"),
    ((None, ""), (0.0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.0012345, "0.00123"), (math.inf, "inf")),
)
def test_significant_digits(value, text):
    assert report.significant(value) == text


def test_folder_is_made_and_proven_writable(tmp_path):
    assert report.results_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(report.FolderError, match=r"cannot write results to .*file/sub: Not a directory"):
        report.results_folder(tmp_path / "file" / "sub")


def test_colours_of_the_demo_differ():
    from benchmarks.demo_options import IMPLEMENTATIONS

    assert len({plots.colour(name) for name in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS)


def test_environment_says_where_and_with_what():
    described = environment("cpu", commit="abc")
    assert described["torch"] == torch.__version__
    assert described["commit"] == "abc"
    assert described["threads"] == torch.get_num_threads()
    assert "/" not in described["device"] or "@" in described["device"]
    assert set(row_environment(described)) >= {"device", "torch", "triton", "commit", "dirty", "date"}


def test_environment_outside_git(monkeypatch):
    def missing(*arguments, **keywords):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    described = environment("cpu")
    assert (described["commit"], described["dirty"]) == ("unknown", None)


def test_commit_and_changes_are_read_from_git(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(environment_module, "REPOSITORY", tmp_path)
    head = git("rev-parse", "HEAD").strip()
    described = environment("cpu")
    assert head.startswith(described["commit"]) and described["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert environment("cpu")["dirty"] is True
