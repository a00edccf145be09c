"""Two runs side by side: what counts as a change, what does not, and what cannot be compared."""

import io
import math

import pytest
from rich.console import Console

from benchmarks import comparison
from benchmarks.comparison import compare, comparison_table, environment_warning

ROW = {
    "suite": "norm",
    "operation": "layer_norm",
    "case": "bf16 [bold]",
    "direction": "forward",
    "provider": "fastattn",
    "status": "ok",
    "median_ms": 10.0,
    "low_ms": 9.9,
    "high_ms": 10.1,
}
FAILED = {key: ROW[key] for key in ("suite", "operation", "case", "direction", "provider")} | {
    "status": "failed",
    "reason": "ValueError: [boom]",
}
ABSENT = FAILED | {"status": "absent", "reason": "no GPU"}


def at(milliseconds, half=0.0, **changes):
    times = {"low_ms": milliseconds * (1 - half), "high_ms": milliseconds * (1 + half)}
    return ROW | {"median_ms": milliseconds} | times | changes


def verdicts(old, new):
    return [change.verdict for change in compare(old, new)]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    (
        (at(10.0), at(10.19), "same"),  # the floor: 1 %, and so nothing below 2 %
        (at(10.0), at(10.21), "slower"),
        (at(10.0), at(9.79), "faster"),
        (at(10.0, half=0.03), at(10.8, half=0.04), "same"),  # 3 and 4 % make 5 %, and so nothing below 10 %
        (at(10.0, half=0.03), at(11.1, half=0.04), "slower"),
        (at(10.0), at(5.0, half=0.4), "same"),
        (at(10.0), FAILED, "now fails"),
        (at(10.0), ABSENT, "now fails"),
        (ABSENT, FAILED, "now fails"),
        (FAILED, at(10.0), "now runs"),
        (ABSENT, at(10.0), "now runs"),
    ),
)
def test_verdicts(old, new, verdict):
    assert verdicts([old], [new]) == [verdict]


@pytest.mark.parametrize(
    ("old", "new"),
    (
        ([], []),
        ([ABSENT], [ABSENT]),
        ([FAILED], [ABSENT]),
        ([FAILED], [FAILED | {"status": "wrong"}]),
        ([], [ABSENT]),
        ([ABSENT], []),
        ([ROW | {"median_ms": None}], [ROW]),
        ([], [ROW | {"median_ms": None}]),
    ),
)
def test_what_is_no_change(old, new):
    assert compare(old, new) == []


def test_ratio_and_noise_of_a_change():
    (change,) = compare([at(10.0, half=0.03)], [at(12.0, half=0.04)])
    assert change.ratio == pytest.approx(1.2) and change.noise == pytest.approx(0.05)
    assert change.noises == pytest.approx(4.0)
    assert (change.old_ms, change.new_ms) == (10.0, 12.0)


def test_noise_is_relative_to_each_median():
    (change,) = compare([at(1.0, half=0.03)], [at(100.0, half=0.04)])
    assert change.noise == pytest.approx(math.hypot(0.03, 0.04))


def test_without_quartiles_the_floor_is_the_noise():
    bare = {key: value for key, value in ROW.items() if key not in ("low_ms", "high_ms")}
    (change,) = compare([bare], [bare | {"median_ms": 10.5}])
    assert change.noise == comparison.NOISE_FLOOR and change.verdict == "slower"


@pytest.mark.parametrize("name", ("suite", "operation", "case", "direction", "provider"))
def test_rows_that_differ_in_a_name_are_different(name):
    gone = "gone" if name == "provider" else "not measured in this run"
    assert verdicts([ROW], [ROW | {name: "other"}]) == ["new", gone]


def test_what_was_not_measured_again_is_one_count():
    """A run of one suite called everything else of the old run gone, a line each."""
    old = [ROW, ROW | {"provider": "lost"}, *(ROW | {"suite": "mlp", "case": case} for case in "abc")]
    text = printed(compare(old, [ROW]))
    assert "1 gone, 1 same, 3 not measured in this run" in text
    assert text.count("│ gone") == 1 and "│ not measured" not in text


def test_rows_of_before_there_were_suites_match():
    old = {key: value for key, value in ROW.items() if key != "suite"}
    assert verdicts([old], [ROW | {"suite": "layer_norm"}]) == ["same"]


def test_of_a_case_measured_twice_the_later_counts():
    (change,) = compare([ROW], [at(20.0), at(10.0)])
    assert change.verdict == "same"


def test_host_rows_are_compared_in_microseconds():
    host = {"operation": "host", "case": "gelu", "status": "ok", "low_us": 4.9, "high_us": 5.1}
    (change,) = compare([host | {"median_us": 5.0}], [host | {"median_us": 6.0}])
    assert change.verdict == "slower" and change.new_ms == pytest.approx(0.006)


def printed(changes):
    console = Console(width=170, file=io.StringIO())
    console.print(comparison_table(changes))
    return console.file.getvalue()


def test_table_shows_what_needs_a_look_first():
    old = [at(10.0, case=case) for case in "abcde"]
    new = [
        at(10.0, case="a"),
        at(5.0, case="b"),
        at(11.0, case="c"),
        at(15.0, case="d"),
        FAILED | {"case": "e"},
    ]
    text = printed(compare(old, new))
    places = [text.index(f"layer_norm │ {case}") for case in "edcba"]
    assert places == sorted(places)
    assert "1 now fails, 2 slower, 1 faster, 1 same" in text
    assert "failed: ValueError: [boom]" in text
    for figure in ("10.0", "15.0", "1.500", "1.0%", "+50.0", "-50.0"):
        assert figure in text


def test_brackets_in_names_are_text():
    assert "bf16 [bold]" in printed(compare([ROW], [ROW]))


def test_empty_table_says_so():
    assert "nothing to compare" in printed([])


def test_different_conditions_are_one_line():
    old = {"device": "A", "torch": "2.11", "triton": "3.6", "commit": "x"}
    assert environment_warning(old, old | {"commit": "y"}) is None
    line = environment_warning(old, {"device": "B", "torch": "2.11", "triton": "3.7"})
    assert line == "The two runs differ in more than the code: device was A, is B; triton was 3.6, is 3.7."
    assert "driver was not recorded, is 580" in environment_warning(old, old | {"driver": "580"})
