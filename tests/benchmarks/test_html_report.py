"""The report as a page: figures, plots, reasons and escaping, and what a real browser makes of it."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import product

import pytest
from PIL import Image

from benchmarks import html_report, suite_panels, suite_plots
from benchmarks.html_report import render_html, write_html
from tests.benchmarks.suite_rows import (
    ATTENTION,
    CEILINGS,
    ENVIRONMENT,
    NORM,
    attention_rows,
    norm_rows,
    suite_rows,
)


@pytest.fixture(scope="module")
def content():
    return {"environment": ENVIRONMENT, "rows": suite_rows()}


@pytest.fixture(scope="module")
def page(content):
    return render_html(content)


def text_of(page):
    """The page's text, with every tag and script taken out and runs of spaces made one."""
    bare = re.sub(r"<(script|style)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def one_row(**changes):
    (row, *_) = norm_rows("forward", 16384, 4096)
    return {**row, "median_ms": 1.23456, **changes}


def test_header_says_on_what_it_was_measured(page):
    text = text_of(page)
    for part in (
        "Imaginary <GPU>, 22 November 2026, 09:32 UTC",
        "commit b362a085b94e with changes",
        "torch 2.11.0",
        "triton 3.6.0",
        "driver 580.1",
        "clocks sm 1980 / memory 3201, then sm 1965 / memory 3201",
        "measured matmul 720 TFLOP/s",
        "measured copy 4100 GB/s",
    ):
        assert part in text


def test_commit_without_changes_and_missing_facts():
    page = render_html({"environment": {"commit": "abc", "dirty": False}, "rows": [one_row()]})
    assert "with changes" not in page and "unknown device, date unknown" in text_of(page)


def test_figures_have_three_digits_in_the_table():
    row = one_row(low_ms=1.20001, high_ms=1.29999, roofline_share=0.87654, tflops=0.0123456, rounds=20)
    text = text_of(render_html({"environment": ENVIRONMENT, "rows": [row]}))
    for figure in ("1.23 (1.20-1.30)", "0.0123", "87.7 %", "18.2", "0.950 (0.930-0.970) 20"):
        assert figure in text
    assert text.endswith(" 20")  # a count has no decimals


def test_a_row_with_a_time_alone_is_shown():
    bare = {"operation": "gelu", "case": "one", "direction": "forward", "provider": "torch", "status": "ok"}
    text = text_of(render_html({"environment": {}, "rows": [{**bare, "median_ms": 2.5, "tflops": None}]}))
    assert "gelu one fwd torch 2.50" in text


def test_rows_without_a_time_are_no_error():
    untimed = one_row(median_ms=None)
    bare = {key: value for key, value in untimed.items() if not key.endswith("_ms")}
    page = render_html({"environment": {}, "rows": [untimed, bare, one_row(provider="fastattn")]})
    assert 'class="heat"' not in page and page.count('<tr class="ours">') == 1


def test_text_is_escaped_everywhere(content, page):
    assert "<GPU>" not in page and "Imaginary &lt;GPU&gt;" in page
    assert "flash-attn is not installed <b>&" not in page
    evil = "<script>alert($1$)</script>"
    names = ("suite", "operation", "case", "direction", "provider")
    rows = [one_row(**dict.fromkeys(names, evil), shape={"width": width, "dtype": evil}) for width in (1, 2)]
    rows.append({**rows[0], "status": evil, "reason": evil})
    hostile = render_html({"environment": dict.fromkeys(ENVIRONMENT, evil), "rows": rows})
    assert "&lt;script&gt;alert($1$)&lt;/script&gt;</text>" in hostile
    assert evil not in hostile and hostile.count("<script>") == page.count("<script>") == 1


def test_a_reason_is_shown_once_with_its_count(page):
    text = text_of(page)
    assert text.count("flash-attn is not installed <b>&") == 1
    assert "12 rows: attention flash-attn-3" in text
    assert "out of memory out of memory 12 rows: attention naive, attention torch-compile" in text


def test_wrong_comes_before_absent():
    rows = [one_row(status="absent", reason="a"), one_row(status="wrong", reason="b")]
    assert [item["status"] for item in html_report.failures(rows)] == ["wrong", "absent"]


def test_a_suite_where_nothing_ran_says_so():
    text = text_of(render_html({"environment": {}, "rows": [one_row(status="failed", reason="broken")]}))
    assert "Nothing of this suite was measured." in text and "failed broken 1 row: norm naive" in text


@pytest.mark.parametrize("empty", ({"environment": ENVIRONMENT, "rows": []}, {}))
def test_no_rows_give_a_page_that_says_so(empty):
    page = render_html(empty)
    assert "No row was measured" in page and "<svg" not in page and "<table" not in page


def test_page_loads_nothing(page):
    for found in re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert found.startswith("#")
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page) and "@import" not in page


class _Nesting(HTMLParser):
    """Checks that every tag is closed in order."""

    VOID = ("meta", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_tags_are_closed_and_ids_are_unique(page):
    parser = _Nesting()
    parser.feed(page)
    assert parser.open == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) > 20 and len(set(ids)) == len(ids)
    assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", page)) <= set(ids)


def test_page_is_the_same_every_time():
    rows = [row for width in (768, 4096) for row in norm_rows("forward", 16384, width)]
    first, second = (render_html({"environment": ENVIRONMENT, "rows": rows}) for _ in range(2))
    assert first == second and "<svg" in first


def test_plots_take_their_text_colour_from_the_page(page):
    assert suite_plots.TEXT not in page and suite_plots.GRID not in page
    assert page.count("<svg") == page.count("<figure") > 10
    assert "color-scheme: light dark" in page and "currentColor" in page


def test_speed_is_shown_in_the_unit_that_limits():
    (attention, *_), (norm, *_) = attention_rows("forward", 64, 4096), norm_rows("forward", 16384, 4096)
    assert suite_panels.speed_unit([attention]).key == "tflops"
    assert suite_panels.speed_unit([{**attention, "tflops": 0.1}]).key == "tflops"
    assert suite_panels.speed_unit([norm]).key == "gbytes_per_s"
    assert suite_panels.speed_unit([{**attention, "suite": "decode"}]).key == "gbytes_per_s"
    assert suite_panels.speed_unit([{**norm, "tokens_per_s": 1e5}]).key == "tokens_per_s"
    assert suite_panels.speed_unit([{"operation": "step", "median_ms": 1.0}]).key == "median_ms"


def test_curves_are_over_the_size_that_varies(content):
    rows = [row for row in content["rows"] if row["operation"] != "ceiling"]
    found, rest = suite_panels.panels(rows)
    assert [panel.axis for panel in found] == ["sequence length"] * 4 + ["width"] * 2
    assert found[0].family == "16 heads, head dim 64, causal top_left, bf16"
    assert sorted({size for size, _ in found[0].values}) == [1024, 4096, 16384]
    assert {row["case"] for row in rest} == {"bf16-4096x65536"}


def test_two_batches_of_one_length_are_two_curves():
    rows = []
    for batch, length in product((1, 8), (128, 256)):
        (row, *_) = attention_rows("forward", 64, length)
        rows.append({**row, "shape": {**row["shape"], "batch": batch}})
    found, rest = suite_panels.panels(rows)
    assert [panel.family.partition(",")[0] for panel in found] == ["batch 1", "batch 8"] and not rest


def test_no_two_providers_look_alike():
    names = [*ATTENTION, *NORM, "flash-attn-2", "flash-attn-3", "xformers", "quack", *map(str, range(20))]
    styles = suite_plots.provider_styles(names)
    assert len(set(styles.values())) == len(styles) == len(set(names))


@pytest.mark.parametrize(
    ("positions", "expected"),
    (
        ([], []),
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.2, 0.5, 0.56, 0.7], [0.2, 0.48, 0.58, 0.7]),
        ([0.95, 0.95, 1.0], [0.8, 0.9, 1.0]),
        ([0.0, 0.0, 0.9], [0.0, 0.1, 0.9]),
    ),
)
def test_names_are_spread_apart(positions, expected):
    assert suite_plots.spread_apart(positions, gap=0.1) == pytest.approx(expected)


def test_curves_that_end_early_say_why(page):
    text = text_of(page)
    assert "Out of memory at 16k: naive, torch-compile, sdpa-math" in text


def test_heat_map_holds_the_ratio_to_each_peer_and_to_the_best():
    rows = [one_row(provider=name, median_ms=ms) for name, ms in (("a", 2.0), ("b", 4.0), ("fastattn", 3.0))]
    rows += [one_row(provider="fastattn-triton", median_ms=1.0), one_row(provider="c", status="failed")]
    heat = html_report.heat_map(rows)
    assert heat["peers"] == ["a", "b"]
    assert [cell.text for cell in heat["lines"][0]["cells"]] == ["1.50", "a", "1.50", "0.750"]
    assert html_report.heat_map(rows[2:]) is None and html_report.heat_map(rows[:2]) is None
    assert "faster than the fastest peer in 0 of 1 cases; its time is 1.50 of" in html_report.summary(rows)


def test_heat_map_shows_our_fastest_where_the_default_was_not_measured():
    rows = [one_row(provider="a", median_ms=2.0), one_row(provider="fastattn-triton", median_ms=1.0)]
    assert html_report.heat_map(rows)["lines"][0]["cells"][0].text == "0.500"


def test_heat_map_says_why_a_cell_is_empty():
    rows = [one_row(provider="fastattn"), one_row(provider="a")]
    other = one_row(provider="a", case="other", status="out of memory", reason="80 GiB")
    cell = html_report.heat_map([*rows, one_row(provider="fastattn", case="other"), other])["lines"][1]
    assert (cell["cells"][2].text, cell["cells"][2].title) == ("no memory", "80 GiB")


def test_heat_colours_are_symmetric_and_none_at_one():
    assert html_report.heat_colour(1.0).endswith(" 0.00)")
    faster, slower = html_report.heat_colour(0.5), html_report.heat_colour(2.0)
    assert faster.startswith("rgba(0, 114, 178") and slower.startswith("rgba(213, 94, 0")
    assert faster.split()[-1] == slower.split()[-1] == "0.36)"


def test_ceilings_are_the_largest_of_each_kind():
    slow = {
        "operation": "ceiling",
        "case": "matmul",
        "status": "ok",
        "tflops": 50.0,
        "shape": {"dtype": "fp32"},
    }
    rows = [html_report._complete(row) for row in (slow, *CEILINGS)]
    rows += [{**row, "tflops": 10.0, "gbytes_per_s": 10.0} for row in rows[1:]]
    found = html_report.find_ceilings(rows)
    assert found.tflops == (("matmul", 720.0), ("matmul fp32", 50.0)) and found.gbytes_per_s == 4100.0


def test_roofline_names_both_ceilings(page):
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert drawn.count("matmul 720 TFLOP/s") == drawn.count("copy 4100 GB/s") == 2
    assert "attention copy" not in text_of(page)  # a ceiling is no row of the table
    unknown = text_of(render_html({"environment": {}, "rows": [one_row()]}))
    assert "No ceilings were measured in this run." in unknown


def _browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no Chromium on this machine: chromium, chromium-browser and google-chrome are not found")


def _open(path, folder, *options):
    base = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    base += [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    command = [_browser(), *base, *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


# Sorts by time as a reader would, then writes what the browser made of the page where --dump-dom shows it.
_PROBE = """<script>
  const heads = [...document.querySelectorAll(".sortable th")];
  heads.find(head => head.textContent.startsWith("ms")).querySelector("button").click();
  const size = element => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
  document.body.dataset.probe = JSON.stringify({
    svgs: [...document.querySelectorAll("svg")].map(size),
    marks: [...document.querySelectorAll("svg")].map(svg => svg.querySelectorAll("use, path").length),
    heats: [...document.querySelectorAll("table.heat")].map(size),
    ink: getComputedStyle(document.querySelector("svg text")).fill,
    font: getComputedStyle(document.querySelector("svg text")).fontFamily,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    times: [...document.querySelectorAll(".sortable tbody tr")].map(row => +row.cells[4].dataset.value),
  });
</script></body>"""


@pytest.mark.slow
def test_a_browser_shows_every_plot_and_sorts_the_table(tmp_path, content, page):
    path = tmp_path / "report.html"
    write_html(path, content)
    assert path.read_text(encoding="utf-8") == page
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", _PROBE), encoding="utf-8")
    for window in ("1280,1000", "500,900"):
        dumped = _open(probed, tmp_path, f"--window-size={window}", "--dump-dom")
        probe = json.loads(unescape(re.search(r'data-probe="([^"]*)"', dumped)[1]))
        assert len(probe["svgs"]) == page.count("<svg") and len(probe["heats"]) == 2
        assert all(width > 300 and height > 80 for width, height in probe["svgs"] + probe["heats"])
        assert min(probe["marks"]) > 10 and probe["overflow"] <= 0
        assert probe["ink"] == "rgb(27, 31, 36)" and probe["font"].startswith("system-ui")
        assert len(probe["times"]) > 50 and probe["times"] == sorted(probe["times"])
    shot = tmp_path / "shot.png"
    _open(path, tmp_path, "--window-size=1280,3000", "--hide-scrollbars", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(213, 94, 0), (0, 114, 178), (255, 255, 255)} <= colours  # ours, torch, the paper
