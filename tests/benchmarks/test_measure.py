"""What keeps a provider from being timed, or from spoiling the others; and what a case's rows hold."""

import gc
import weakref

import pytest
import torch

from benchmarks import measure, training_step
from benchmarks.cases import AttentionCase, BlockCase, GeluCase, GptCase, LayerNormCase, LossCase
from benchmarks.measure import Failed, Inputs, figures, measure_case, prepare, with_repeat
from benchmarks.providers import PROVIDERS
from benchmarks.training_step import measure_gpt
from fastattn import NotSupported

CPU = torch.device("cpu")


def spoil_last(right, case, spoil):
    """A provider whose result is right but at its end."""

    def provide(c, device):
        def call(*tensors):
            out = right(c, device)(*tensors).clone()
            spoil(out)
            return out

        return call

    return provide


@pytest.mark.parametrize(
    "case",
    (AttentionCase(2, 4, 9, 16, kv_heads=2), LayerNormCase(600, 8), BlockCase(3, 300, 16, 2)),
    ids=lambda case: case.name,
)
def test_a_wrong_end_of_a_result_is_caught(case, extra_provider):
    """Only the first 256 rows, and of attention the first key head, were compared: the rest could be anything."""

    def wrong(out):
        out.view(-1, out.size(-1))[-1].mul_(1.01)

    extra_provider(case.operation, "wrong", spoil_last(PROVIDERS[case.operation]["torch"], case, wrong))
    with pytest.raises(Failed, match="wrong: output: largest error"):
        prepare(Inputs(case, CPU), "wrong", "forward")


@pytest.mark.parametrize(
    "case", (AttentionCase(3, 2, 9, 16), LayerNormCase(600, 8)), ids=lambda case: case.name
)
def test_nan_anywhere_in_a_result_is_caught(case, extra_provider):
    """In the middle sequence, and in the one row of 600 that no sample has."""

    def wrong(out):
        out[1].fill_(torch.nan)

    extra_provider(case.operation, "wrong", spoil_last(PROVIDERS[case.operation]["torch"], case, wrong))
    with pytest.raises(Failed, match="wrong: output holds infinities or NaN"):
        prepare(Inputs(case, CPU), "wrong", "forward")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda y: y[:-1], r"wrong: output has shape \(2, 17\), not \(3, 17\)"),
        (lambda y: y.double(), "wrong: output has torch.float64, not torch.float32"),
    ),
)
def test_a_result_of_another_shape_or_dtype_is_caught(change, message, extra_provider):
    extra_provider("gelu", "wrong", lambda c, d: lambda x: change(torch.nn.functional.gelu(x)))
    with pytest.raises(Failed, match=message):
        prepare(Inputs(GeluCase(3, 17), CPU), "wrong", "forward")


@pytest.mark.parametrize("case", (LayerNormCase(2000, 8), AttentionCase(3, 4, 9, 16)), ids=lambda c: c.name)
def test_what_results_are_compared_with_keeps_nothing_larger_alive(case):
    """The truth of a large case is gigabytes of float64, of which a view would keep all."""
    inputs = Inputs(case, CPU)
    for tensor in (*inputs._truth, *inputs._peer):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_gradient_that_a_backward_overwrites_is_restored(extra_provider):
    """A backward that works in place in the upstream gradient spoiled the check of all providers after it."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.nn.functional.gelu(x)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return dy.copy_(torch.ops.aten.gelu_backward(dy, x))

    extra_provider("gelu", "in-place", lambda c, d: InPlace.apply)
    inputs = Inputs(GeluCase(3, 17), CPU)
    before = inputs.grad_outputs[0].clone()
    with pytest.raises(Failed, match="wrong: it overwrote the output's gradient"):
        prepare(inputs, "in-place", "forward+backward")
    assert inputs.grad_outputs[0].equal(before)
    prepare(inputs, "torch", "forward+backward")


def test_inputs_are_restored_after_an_error_too(extra_provider):
    def failing(x):
        x.detach().zero_()
        raise RuntimeError("boom")

    extra_provider("gelu", "failing", lambda c, d: failing)
    inputs = Inputs(GeluCase(3, 17), CPU)
    with pytest.raises(Failed, match="RuntimeError: boom"):
        prepare(inputs, "failing", "forward")
    assert inputs.tensors[0].abs().sum() > 0


def test_a_loss_is_differentiated_as_by_its_backward():
    """Kernels skip a product where the gradient from above is 1, as it always is in training."""
    assert Inputs(LossCase(21, 13), CPU).grad_outputs[0] == 1


def test_inputs_that_a_provider_overwrites_are_restored(extra_provider):
    """A kernel that works in place would give every later provider other inputs than the reference had."""
    extra_provider(
        "gelu", "in-place", lambda c, d: lambda x: torch.nn.functional.gelu(x).add_(x.detach().zero_())
    )
    inputs = Inputs(GeluCase(3, 17), CPU)
    before = inputs.tensors[0].detach().clone()
    with pytest.raises(Failed, match="wrong: it overwrote input 0"):
        prepare(inputs, "in-place", "forward")
    assert inputs.tensors[0].equal(before)
    prepare(inputs, "torch", "forward")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    (
        (RuntimeError("No available kernel.\nAborting execution."), "absent", "No available kernel."),
        (ImportError("No module named 'peer'"), "absent", "No module named 'peer'"),
        (NotSupported("head_dim=320 is above 256"), "absent", "head_dim=320 is above 256"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory", "out of memory"),
        (
            RuntimeError("CUDA error: an illegal memory access"),
            "failed",
            "RuntimeError: CUDA error: an illegal memory access",
        ),
        (OSError("out of resource: shared memory"), "failed", "OSError: out of resource: shared memory"),
    ),
)
def test_a_failure_is_a_row_with_its_reason(error, status, reason, extra_provider, no_interpreter):
    """A kernel that fails is neither absent nor the end of the run."""

    def failing(case, device):
        raise error

    extra_provider("gelu", "failing", failing)
    (row,) = measure_case(GeluCase(3, 17), CPU, 1, directions=("forward",), names=("failing",))
    assert (row["status"], row["reason"]) == (status, reason)


@pytest.mark.parametrize("calls", (1, 3, 6))  # in the check, in the first round, while memory is measured
def test_an_error_while_timing_is_that_providers_row(calls, extra_provider, no_interpreter):
    """It used to end the run."""
    left = iter(range(calls))

    def failing(x):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.gelu(x)

    extra_provider("gelu", "failing", lambda c, d: failing)
    names, timer = ("failing", "torch"), lambda call: (call(), 1.0)[1]
    rows = list(measure_case(GeluCase(3, 17), CPU, 3, directions=("forward",), names=names, timer=timer))
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert "median_ms" not in rows[0] and rows[1]["rounds"] == 3


def test_memory_is_given_back_once_nothing_holds_the_inputs(monkeypatch, no_interpreter):
    """The calls, and the timer that knows them, kept all tensors of a case while its memory was given back."""
    made, alive = [], []
    inputs = GeluCase.inputs

    def watched(case, device):
        tensors = inputs(case, device)
        made.extend(weakref.ref(tensor) for tensor in tensors)
        return tensors

    def release(device):
        gc.collect()
        alive.extend(tensor() for tensor in made)

    monkeypatch.setattr(GeluCase, "inputs", watched)
    monkeypatch.setattr(measure, "release", release)
    rows = list(measure_case(GeluCase(3, 17), CPU, 1, names=("torch",)))
    assert len(rows) == 2 and alive == [None]


@pytest.mark.parametrize(("device", "waits"), (("cuda", True), ("cpu", None)))
def test_every_training_step_waits_for_a_gpu(device, waits, monkeypatch):
    """It reads the loss; its rows say so, as those of an operation that waits."""
    monkeypatch.setattr(training_step, "make_step", lambda case, name, device: lambda: None)
    monkeypatch.setattr(training_step, "peak_memory", lambda call, device: 0)
    monkeypatch.setattr(training_step, "release", lambda device: None)
    case = GptCase(layers=1, width=16, heads=2, vocabulary=32, batch=2, seq_len=8)
    (row,) = measure_gpt(case, torch.device(device), 1, ("torch",), timer=lambda call: 1.0)
    assert (row["status"], row.get("waits_for_device")) == ("ok", waits)


def test_an_error_in_a_timed_training_step_is_its_row(monkeypatch, no_interpreter):
    def make_step(case, name, device):
        return (lambda: 1 / 0) if name == "naive" else (lambda: None)

    monkeypatch.setattr(training_step, "make_step", make_step)
    case = GptCase(layers=1, width=16, heads=2, vocabulary=32, batch=2, seq_len=8)
    naive, pytorch = measure_gpt(case, CPU, 2, ("naive", "torch"), timer=lambda call: (call(), 1.0)[1])
    assert (naive["status"], naive["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert (pytorch["status"], pytorch["rounds"]) == ("ok", 2)


def test_compiled_code_lives_as_long_as_its_case(monkeypatch, no_interpreter):
    """A reset inside a provider dropped the code of the provider before it, which then compiled while timed."""
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rows = list(measure_case(GeluCase(3, 17), CPU, 1, names=("torch", "torch-compile")))
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert len(resets) == 1


def test_clocks_are_read_once_a_direction(monkeypatch, no_interpreter):
    """Reading them takes longer than timing, and they are the device's, not a provider's."""
    read = []
    monkeypatch.setattr(
        measure, "clocks_under_load", lambda call, ms, device: read.append(ms) or {"clock_mhz": len(read)}
    )
    rows = list(measure_case(GeluCase(3, 17), CPU, 1, names=("torch", "naive")))
    assert [row["clock_mhz"] for row in rows] == [1, 1, 2, 2]
    assert read == [min(rows[i]["median_ms"], rows[i + 1]["median_ms"]) for i in (0, 2)]


def test_no_names_measure_nothing(no_interpreter):
    assert list(measure_case(GeluCase(3, 17), CPU, 1, directions=("forward",), names=())) == []


def test_rows_of_a_case(no_interpreter, extra_provider):
    extra_provider("gelu", "wrong", lambda c, d: lambda x: x + 1)
    case, milliseconds = GeluCase(3, 17), iter(range(1, 1000))
    rows = list(
        measure_case(
            case,
            CPU,
            rounds=3,
            names=("naive", "torch", "fastattn", "fastattn-triton", "wrong"),
            timer=lambda call: (call(), float(next(milliseconds)))[1],
        )
    )
    assert [row["direction"] for row in rows] == ["forward"] * 5 + ["forward+backward"] * 5
    by_name = {row["provider"]: row for row in rows[:5]}
    assert by_name["fastattn-triton"]["status"] == "absent"
    assert "not on a GPU" in by_name["fastattn-triton"]["reason"]
    assert by_name["wrong"]["status"] == "wrong"
    assert "median_ms" not in by_name["wrong"]
    naive = by_name["naive"]  # first of four in round 0, second in round 1, last in round 2: 1, 6 and 12 ms
    assert (naive["median_ms"], naive["rounds"]) == (6.0, 3)
    assert naive["time_vs_naive"] == 1.0
    assert naive["time_vs_torch"] == pytest.approx(12 / 10)  # torch: 3, 5 and 10 ms in these rounds
    assert by_name["torch"]["time_vs_itself"] == pytest.approx(10 / 11)  # its second time: 2, 8 and 11 ms
    assert naive["peak_mib"] > by_name["torch"]["peak_mib"] == pytest.approx(3 * 17 * 4 / 2**20)
    assert naive["gbytes_per_s"] == pytest.approx(2 * 3 * 17 * 4 / 6e6)


def test_the_noise_is_a_provider_timed_twice(no_interpreter):
    """PyTorch's call comes twice in every round; the naive one's where PyTorch's is not measured."""
    milliseconds = iter(
        (4.0, 2.0, 5.0, 4.0)
    )  # torch, torch again, and in the second round the other way round
    (row,) = measure_case(
        GeluCase(3, 17),
        CPU,
        rounds=2,
        directions=("forward",),
        names=("torch",),
        timer=lambda call: next(milliseconds),
    )
    assert row["time_vs_itself"] == pytest.approx((4 / 2 + 4 / 5) / 2)
    assert row["time_vs_itself_low"] <= row["time_vs_itself"] <= row["time_vs_itself_high"]
    assert list(with_repeat({"naive": 1, "torch": 2, "mine": 3})) == ["naive", "torch", "mine", "torch again"]
    assert list(with_repeat({"naive": 1, "mine": 3})) == ["naive", "mine", "naive again"]
    assert list(with_repeat({"mine": 3})) == ["mine"]


def test_figures_without_baselines_have_no_ratio():
    row = figures("mine", {"mine": [1.0, 2.0, 3.0]})
    assert row["median_ms"] == 2.0
    assert not [key for key in row if key.startswith("time_vs")]
