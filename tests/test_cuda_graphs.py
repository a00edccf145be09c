"""Forward and backward of every operation can be captured in a CUDA graph, since nothing waits for the device."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops._register import LAUNCHERS
from fastattn.testing import make_tensor

BATCH, HEADS, SEQ, WIDTH = 2, 2, 13, 16
Call = Callable[..., Any]


def _make(*shape: int, seed: int = 0) -> Callable[[torch.device], Tensor]:
    return lambda device: make_tensor(*shape, seed=seed, device=device, requires_grad=True)


_QKV = [_make(BATCH, HEADS, SEQ, WIDTH, seed=seed) for seed in range(3)]
_ONE_QUERY = [_make(BATCH, HEADS, n, WIDTH, seed=seed) for seed, n in enumerate((1, 70, 70))]
_PACKED = [_make(SEQ, HEADS, WIDTH, seed=seed) for seed in range(3)]
_ROWS, _WEIGHT, _BIAS = _make(SEQ, WIDTH), _make(WIDTH, seed=1), _make(WIDTH, seed=2)
_MATRIX = _make(WIDTH, WIDTH, seed=3)


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = _constant([0, 5, SEQ], torch.int32, q.device)
    return fastattn.attention_varlen(q, k, v, starts, starts, 8, 8, causal="bottom_right")


def _rotary(x: Tensor) -> Tensor:
    cos, sin = fastattn.rotary_tables(SEQ, WIDTH, device=x.device)
    positions = _constant(list(range(SEQ)), torch.int64, x.device).expand(BATCH, SEQ)
    return fastattn.rotary_embedding(x, cos, sin, positions=positions)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, key_lengths=_constant([70, 33], torch.int32, q.device))


def _linear_loss(x: Tensor, weight: Tensor) -> Tensor:
    return fastattn.linear_cross_entropy(x, weight, _targets(x))


def _targets(x: Tensor) -> Tensor:
    return _constant([3, -100, *range(SEQ - 2)], torch.int64, x.device)


def _constant(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once, outside of any capture: from the host it is copied."""
    key = (tuple(values), dtype, device)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = torch.tensor(values, dtype=dtype, device=device)
    return _CONSTANTS[key]


_CONSTANTS: dict[Any, Tensor] = {}

# What is differentiated, and the call.
CALLS: dict[str, tuple[list[Callable[[torch.device], Tensor]], Call]] = {
    "attention": (_QKV, lambda q, k, v: fastattn.attention(q, k, v, causal=True)),
    "attention_dropout": (_QKV, lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.25)),
    "attention_varlen": (_PACKED, _varlen),
    "attention_decode": (_ONE_QUERY, _decode),
    "sdpa": (_QKV, lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "layer_norm": ([_ROWS, _WEIGHT, _BIAS], lambda x, w, b: fastattn.layer_norm(x, WIDTH, w, b)),
    "rms_norm": ([_ROWS, _WEIGHT], lambda x, w: fastattn.rms_norm(x, WIDTH, w)),
    "add_layer_norm": (
        [_ROWS, _make(SEQ, WIDTH, seed=4), _WEIGHT, _BIAS],
        lambda x, r, w, b: fastattn.add_layer_norm(x, r, WIDTH, w, b, dropout_p=0.25)[0],
    ),
    "gelu": ([_ROWS], lambda x: fastattn.gelu(x)),
    "bias_gelu": ([_ROWS, _BIAS], lambda x, b: fastattn.bias_gelu(x, b)),
    "swiglu": ([_ROWS], lambda x: fastattn.swiglu(x)),
    "mlp": ([_ROWS, _MATRIX, _BIAS], lambda x, w, b: fastattn.mlp(x, w, b, w, b)),
    "cross_entropy": ([_ROWS], lambda x: fastattn.cross_entropy(x, _targets(x))),
    "linear_cross_entropy": ([_ROWS, _MATRIX], _linear_loss),
    "rotary_embedding": ([_QKV[0]], _rotary),
}


def _step(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    out = call(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


class _NothingWaits(TorchDispatchMode):
    """Refuses the operators whose result, or its shape, the host has to wait for."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        if name in ("index", "index_put_"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), (
                f"{name} by a mask waits"
            )
        if func.namespace == "fastattn":
            with self:  # what the operator runs is looked at too
                return LAUNCHERS[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where values cost nothing to read, targets and lengths are checked; on a GPU they are not."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastattn") and hasattr(module, "checking"):
            monkeypatch.setattr(module, "checking", lambda tensor: False)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str, device: torch.device, no_checks: None) -> None:
    makers, call = CALLS[name]
    inputs = [make(device) for make in makers]
    with fastattn.use_implementation("triton"):
        expected = _step(call, inputs)  # constants are made
        with _NothingWaits():
            found = _step(call, inputs)
    assert [t.shape for t in found] == [t.shape for t in expected]


def test_what_waits_within_an_operator_is_found(
    device: torch.device, no_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's own calls went by unseen, and in them is nearly everything."""
    monkeypatch.setitem(LAUNCHERS, "gelu_forward", lambda x, approximate: x * x.sum().item())
    with fastattn.use_implementation("triton"), pytest.raises(AssertionError, match="waits"), _NothingWaits():
        fastattn.gelu(make_tensor(3, device=device))


def test_what_waits_is_found() -> None:
    x = make_tensor(3)
    for waiting in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.sum() > 0)):
        with pytest.raises(AssertionError, match="waits"), _NothingWaits():
            waiting()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_captured_and_replayed(name: str) -> None:
    """A replay computes on what the inputs then hold, and draws other random numbers than the one before."""
    device = torch.device("cuda")
    makers, call = CALLS[name]
    inputs = [make(device) for make in makers]
    with fastattn.use_implementation("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled, and memory is taken
                _step(call, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(call, inputs)
        with torch.no_grad():
            for tensor in inputs:
                tensor.mul_(1.5)
        graph.replay()
        first = [t.clone() for t in captured]
        graph.replay()
        if name in ("attention_dropout", "add_layer_norm"):
            assert not torch.equal(first[0], captured[0])
            return
        for again, replayed, eager in zip(first, captured, _step(call, inputs), strict=True):
            assert torch.equal(again, replayed)
            torch.testing.assert_close(replayed, eager)


@pytest.mark.gpu
def test_calls_made_before_are_captured_and_replayed() -> None:
    """Without gradients, and nothing forced, attention and norms go straight to launches that are kept."""
    q, x, weight = (make_tensor(*s, device="cuda").half() for s in ((2, 4, 64, 64), (32, 256), (256,)))

    def call() -> list[torch.Tensor]:
        return [fastattn.attention(q, q, q, causal=True), fastattn.rms_norm(x, (256,), weight)]

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        q.mul_(1.5), x.mul_(1.5), weight.add_(1.0)
        graph.replay()
        with fastattn.use_implementation("triton"):
            expected = call()
        assert all(map(torch.equal, captured, expected))
