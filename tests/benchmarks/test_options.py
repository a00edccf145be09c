"""Cases of attention with options: every provider agrees with the formula, and each is timed beside the plain case."""

import pytest
import torch

from benchmarks.cases import AttentionCase
from benchmarks.cases.attention_options import OPTIONS, split_options
from benchmarks.inputs import Inputs
from benchmarks.measure import DIRECTIONS, measure_case, prepare
from benchmarks.providers import PROVIDERS, Absent
from benchmarks.readme import options_figures
from benchmarks.suites import SUITES

CPU = torch.device("cpu")
NOT_PYTORCHS = ("softcap", "lse", "sinks")


def case(options):
    return AttentionCase(2, 4, 9, 16, kv_heads=2, seq_k=13, causal="bottom_right", options=options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", ("naive", "torch", "fastattn", "fastattn-torch"))
@pytest.mark.parametrize("options", (*OPTIONS, "bias+alibi+window", "mask+sinks+lse"))
def test_provider_agrees_with_the_reference(options, provider, direction, no_interpreter):
    inputs = Inputs(case(options), CPU)
    if provider == "torch" and set(options.split("+")) & set(NOT_PYTORCHS):
        with pytest.raises(Absent, match="PyTorch's operator has no"):
            prepare(inputs, provider, direction)
        return
    results = prepare(inputs, provider, direction)()
    outputs, gradients = 2 if "lse" in options else 1, 4 if "bias" in options or "sinks" in options else 3
    assert len(results) == outputs + (gradients if direction == DIRECTIONS[1] else 0)


@pytest.mark.parametrize("options", ("softcap+lse", "mask+bias"))
def test_triton_provider_agrees_with_the_reference(options, device, monkeypatch):
    monkeypatch.setattr("benchmarks.providers.attention.refuse_interpreter", lambda device: None)
    prepare(Inputs(case(options), device), "fastattn-triton", DIRECTIONS[1])


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "dropout"])
def test_an_option_that_is_left_out_is_caught(options, extra_provider):
    def without(of_case, device):
        function = PROVIDERS["attention"]["naive"](of_case.plain, device)
        outputs = len(of_case.learned(tuple(Inputs(of_case, CPU).tensors[3:])))

        def call(q, k, v, *learned):
            assert len(learned) == outputs
            return function(q, k, v)

        return call

    extra_provider("attention", "without", without)
    if options == "lse":  # one output too few is one gradient short of what is asked
        assert len(prepare(Inputs(case("lse"), CPU), "without", "forward")()) == 1
        return
    with pytest.raises(Exception, match="wrong: output: largest error"):
        prepare(Inputs(case(options), CPU), "without", "forward")


def test_every_option_is_timed_beside_the_plain_case(no_interpreter, monkeypatch):
    """In the same rounds: the second call of a provider is its plain one."""
    seen = []

    def timer(call):
        outputs = call()
        seen.append(len(outputs))
        return 3.0 if len(outputs) == 2 else 2.0  # the log-sum-exp is a second output

    names = ("naive", "fastattn")
    rows = list(measure_case(case("lse"), CPU, 2, directions=("forward",), names=names, timer=timer))
    assert sorted(seen) == [1] * 4 + [2] * 6  # naive, fastattn, and naive again; both plain
    assert [row["time_vs_plain"] for row in rows] == [1.5, 1.5]
    assert all(row["peak_mib"] > row["plain_peak_mib"] > 0 for row in rows)
    (row,) = measure_case(case(""), CPU, 1, directions=("forward",), names=("naive",), timer=timer)
    assert "time_vs_plain" not in row and "plain_peak_mib" not in row


def test_plain_gradients_are_those_of_the_operands(no_interpreter):
    inputs = Inputs(case("bias+lse"), CPU)
    plain = inputs.without_options()
    results = plain.call(PROVIDERS["attention"]["torch"](plain.case, CPU), DIRECTIONS[1])()
    expected = prepare(Inputs(case(""), CPU), "naive", DIRECTIONS[1])()
    assert len(results) == 4
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_suite_has_every_option():
    for cases in (SUITES["options"].cpu, SUITES["options"].gpu):
        assert {name for c in cases for name in c.asked} == set(OPTIONS)


@pytest.mark.parametrize("options", ("speed", "bias+", "bias+bias"))
def test_unknown_options_list_the_known(options):
    with pytest.raises(ValueError, match=r"options='.*' must be names joined by '\+'; there are window"):
        split_options(options)


def test_a_table_of_what_options_cost():
    row = dict(
        suite="options", provider="fastattn", status="ok", case="fp32-full-b1h1-s8-d8-bias", median_ms=1.0
    )
    row |= dict(time_vs_plain=1.25, time_vs_plain_low=1.2, time_vs_plain_high=1.3, shape={"options": "bias"})
    rows = [
        row | dict(direction="forward", plain_peak_mib=1.0, peak_mib=1.5),
        row | dict(direction="forward+backward", time_vs_plain=1.5, plain_peak_mib=2.0, peak_mib=3.0),
        row | dict(direction="forward", provider="naive", time_vs_plain=9.0),
    ]
    text = options_figures({"rows": rows}, "folder")
    assert "(fp32-full-b1h1-s8-d8, in `folder/`)" in text
    assert (
        text.splitlines()[-1]
        == "| bias | 1.25 [1.20, 1.30] | 1.50 [1.20, 1.30] |  | 1.00, 1.50 | 2.00, 3.00 |"
    )
