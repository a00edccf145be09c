"""Every provider agrees with the reference on a small case; one that cannot run says why; wrong ones are caught."""

from functools import partial

import pytest
import torch

from benchmarks import cases
from benchmarks.cases import (
    AddLayerNormCase,
    AddRMSNormCase,
    AttentionCase,
    BiasGeluCase,
    BlockCase,
    GegluCase,
    GeluCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    MlpCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.ceilings import measure_ceilings
from benchmarks.inputs import as_tuple
from benchmarks.measure import DIRECTIONS, Failed, Inputs, prepare
from benchmarks.providers import PROVIDERS, Absent, provider
from fastattn import dispatch

CPU = torch.device("cpu")
CASES = (
    AttentionCase(2, 4, 9, 16, kv_heads=2, seq_k=13, causal="bottom_right"),
    AttentionCase(1, 2, 17, 16, causal="top_left"),
    LayerNormCase(5, 33),
    LayerNormCase(300, 8, affine=False),
    RMSNormCase(5, 33),
    AddLayerNormCase(5, 33),
    AddRMSNormCase(5, 33),
    GeluCase(3, 17),
    GeluCase(3, 17, "tanh"),
    BiasGeluCase(5, 17),
    GegluCase(3, 17),
    SwigluCase(3, 17),
    MlpCase(5, 8, 12),
    LossCase(21, 13),
    LinearLossCase(21, 8, 13),
    BlockCase(2, 9, 16, 2),
    RotaryCase(2, 3, 9, 16),
    RotaryCase(1, 2, 5, 6, interleaved=True),
)
GPU_ONLY = (
    *("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "flex-compile"),
    *("fastattn-triton", "fastattn-fused", "fastattn-separate"),
    *("fastattn-descriptors", "fastattn-specialized", "fastattn-reduction", "fastattn-warp-groups"),
)
# Packages that are not installed here, and what is not written yet.
ABSENT = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "liger", "quack")
PAIRS = [(case, name) for case in CASES for name in PROVIDERS[case.operation]]


@pytest.fixture
def no_code_generation(monkeypatch):
    """torch.compile traces, but compiles nothing: seconds instead of minutes, and no C++ compiler needed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_provider_agrees_with_the_reference(case, name, direction, no_interpreter, no_code_generation):
    """`prepare` raises AssertionError where it does not."""
    inputs = Inputs(case, CPU)
    if name in ABSENT:
        with pytest.raises(Absent, match=r"No module named|needs a GPU"):
            prepare(inputs, name, direction)
        return
    if name in GPU_ONLY:
        with pytest.raises(Absent, match="GPU"):
            prepare(inputs, name, direction)
        return
    if name == "torch-chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("PyTorch has it from 2.13 on")
    results = prepare(inputs, name, direction)()
    assert len(results) == len(inputs.grad_outputs) + (0 if direction == "forward" else len(inputs.tensors))


@pytest.mark.parametrize(
    "case", [c for c in CASES if "fastattn-triton" in PROVIDERS[c.operation]], ids=lambda case: case.name
)
def test_triton_provider_agrees_with_the_reference(case, device, monkeypatch):
    """The kernels themselves, by the interpreter where there is no GPU; only the benchmarks refuse it."""
    for module in ("attention", "norm", "mlp", "loss", "rotary"):
        monkeypatch.setattr(f"benchmarks.providers.{module}.refuse_interpreter", lambda device: None)
    for direction in DIRECTIONS:
        prepare(Inputs(case, device), "fastattn-triton", direction)


def test_interpreter_is_refused_as_a_measurement(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    with pytest.raises(Absent, match="TRITON_INTERPRET is set"):
        prepare(Inputs(CASES[-1], CPU), "fastattn", "forward")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_result_is_caught_before_it_is_timed(case, extra_provider):
    right = PROVIDERS[case.operation]["torch"]
    extra_provider(
        case.operation,
        "wrong",
        lambda c, d: lambda *t: tuple(out * 1.001 for out in as_tuple(right(c, d)(*t))),
    )
    with pytest.raises(Failed, match=r"wrong: output( 0)?: largest error"):
        prepare(Inputs(case, CPU), "wrong", "forward")


def test_wrong_gradient_is_caught(extra_provider):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.nn.functional.gelu(x)

        @staticmethod
        def backward(ctx, dy):
            return dy

    extra_provider("gelu", "wrong", lambda c, d: Wrong.apply)
    inputs = Inputs(GeluCase(3, 17), CPU)
    prepare(inputs, "wrong", "forward")
    with pytest.raises(Failed, match="wrong: gradient 0: largest error"):
        prepare(inputs, "wrong", "forward+backward")


def test_wrong_last_row_of_a_parameter_gradient_is_caught(extra_provider):
    """Results of many rows are compared in part; a parameter's gradient never is."""

    def wrong(case, device):
        right = PROVIDERS["layer_norm"]["torch"](case, device)

        def call(x, weight, bias):
            y = right(x, weight, bias)
            if bias.requires_grad and torch.is_grad_enabled():
                bias.register_hook(lambda g: g + torch.eye(len(g))[-1])
            return y

        return call

    extra_provider("layer_norm", "wrong", wrong)
    with pytest.raises(Failed, match="wrong: gradient 2: largest error"):
        prepare(Inputs(LayerNormCase(5, 300), CPU), "wrong", "forward+backward")


def test_pytorchs_chunks_are_asked_for(monkeypatch):
    """Without options its function computes all logits, as "torch" does already."""
    asked = []

    def linear_cross_entropy(input, linear_weight, target, *, options=None):
        asked.append(options)
        return torch.nn.functional.cross_entropy(input @ linear_weight.t(), target)

    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "in chunks", raising=False)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", linear_cross_entropy, raising=False)
    prepare(Inputs(LinearLossCase(21, 8, 13), CPU), "torch-chunked", "forward")
    assert set(asked) == {"in chunks"}


def test_pytorchs_chunks_are_absent_before_it_had_them(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(Absent, match=r"linear_cross_entropy has no chunks in PyTorch \d"):
        prepare(Inputs(LinearLossCase(21, 8, 13), CPU), "torch-chunked", "forward")


def test_ceilings_count_bytes_both_ways_and_two_operations_a_product():
    copy, product = measure_ceilings(CPU, rounds=2, timer=lambda call: 10.0)
    assert (copy["case"], product["case"]) == ("copy", "matmul")
    assert copy["gbytes_per_s"] == pytest.approx(2 * 64 * 2**20 / 10 / 1e6)
    assert product["tflops"] == pytest.approx(2 * 1024**3 / 10 / 1e9)


def test_provider_names_are_checked():
    with pytest.raises(
        ValueError,
        match="operation='gelus' is unknown; there are attention, layer_norm, rms_norm, add_layer_norm, ",
    ):
        provider("gelus", "mine")
    with pytest.raises(ValueError, match="operation 'gelu' has a provider 'torch' already"):
        provider("gelu", "torch")


@pytest.mark.gpu
def test_inputs_on_a_gpu_are_drawn_there(device, monkeypatch):
    """The largest took seconds each on the host."""
    monkeypatch.setattr(cases.base, "make_tensor", lambda *shape, **options: pytest.fail("drawn on the host"))
    case = AttentionCase(1, 2, 17, 16, dtype=torch.bfloat16)
    first, again = case.inputs(device), case.inputs(device)
    assert all(a.equal(b) and a.requires_grad and a.is_cuda for a, b in zip(first, again, strict=True))
    assert not first[1].equal(first[2])


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_provider_agrees_with_the_reference_on_a_gpu(case, name, direction, device):
    try:
        prepare(Inputs(case, device), name, direction)
    except Absent as absence:
        pytest.skip(str(absence))
