"""The Transformer's layers have torch.nn's parts, go into its stacks, and fuse what is as it was made."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

import fastattn
from tests.models.agreement import assert_near
from tests.nn.layers import (
    BATCH,
    EMBED,
    HEADS,
    HIDDEN,
    LAYERS,
    SEQ,
    call_layer,
    layer_pair,
    make_inputs,
    make_layer,
)
from tests.nn.pairs import assert_same, causal_mask, padding_mask


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_and_parts_are_torch_nns(name: str, bias: bool) -> None:
    """Bit for bit, and in the same order: an optimizer's state goes by it."""
    made = []
    for nn in (fastattn.nn, torch.nn):
        torch.manual_seed(3)
        made.append(getattr(nn, name)(EMBED, HEADS, HIDDEN, bias=bias))
        made.append(torch.rand(3))  # as much was drawn
    module, after, peer, peer_after = made
    assert torch.equal(after, peer_after)
    assert [n for n, _ in module.named_modules()] == [n for n, _ in peer.named_modules()]
    for (n, ours), (peer_n, theirs) in zip(module.named_parameters(), peer.named_parameters(), strict=True):
        assert n == peer_n and torch.equal(ours, theirs)
    assert module.__dict__.keys() - peer.__dict__.keys() == {"implementation"}


@pytest.mark.parametrize("name", LAYERS)
def test_forward_takes_torch_nns_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(nn, name).forward).parameters for nn in (fastattn.nn, torch.nn))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_reach_the_parts(name: str) -> None:
    module = getattr(fastattn.nn, name)(
        EMBED, HEADS, HIDDEN, 0.3, F.gelu, 0.5, True, True, dtype=torch.float64, implementation="torch"
    )
    kinds = [type(m) for m in module.modules()]
    norms = kinds.count(fastattn.nn.LayerNorm)
    assert norms == kinds.count(torch.nn.Dropout) - 1 == kinds.count(fastattn.nn.MultiheadAttention) + 1
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            assert part.p == 0.3
        if isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 0.5
        if hasattr(part, "batch_first"):
            assert part.batch_first and part.dropout == 0.3
        assert getattr(part, "implementation", "torch") == "torch"
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert "norm_first=True" in repr(module) and "norm_first" not in repr(make_layer(name))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles(name: str, device: torch.device) -> None:
    module = make_layer(name, device, norm_first=True, activation="gelu")
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    expected = module(*make_inputs(name, device))
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    )
    for copied in copies:
        assert type(copied) is type(module)
        assert torch.equal(copied(*make_inputs(name, device)), expected)


STACKS = {LAYERS[0]: torch.nn.TransformerEncoder, LAYERS[1]: torch.nn.TransformerDecoder}


@pytest.mark.parametrize("name", LAYERS)
def test_inside_torch_nns_stacks(name: str, device: torch.device) -> None:
    pair = layer_pair(name, device, implementation="torch")
    module, peer = (STACKS[name](layer, 2) for layer in pair)
    causal = causal_mask(SEQ, device)

    def call(m: torch.nn.Module, *inputs: Tensor) -> Tensor:
        return m(*inputs, causal)

    assert_same(module, peer, call, *make_inputs(name, device))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"activation": "gelu"},
        {"activation": F.silu},
        {"activation": torch.nn.ReLU()},
        {"batch_first": False},
        {"norm_first": True},
        {"bias": False},
    ],
    ids=["relu", "gelu", "silu", "module", "seq_first", "pre", "no_bias"],
)
def test_the_encoder_warns_as_of_torch_nns_layer(keywords: dict[str, Any]) -> None:
    """It reads the layer's parts to say whether it makes nested tensors of padding masks."""
    said = []
    for layer in layer_pair(LAYERS[0], torch.device("cpu"), **keywords):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stack = torch.nn.TransformerEncoder(layer, 1)
        said.append(([str(w.message) for w in caught], stack.use_nested_tensor))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_encoder_leaves_padding_out_in_inference(
    activation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stack gives the layers nested tensors then, which is torch.nn's fast path."""
    module, peer = (
        torch.nn.TransformerEncoder(layer, 2).eval()
        for layer in layer_pair(LAYERS[0], device, activation=activation)
    )
    seen = []
    nested = fastattn.nn.TransformerEncoderLayer._nested
    monkeypatch.setattr(
        fastattn.nn.TransformerEncoderLayer, "_nested", lambda *a: seen.append(1) or nested(*a)
    )
    padding, (src,) = padding_mask(SEQ, device, BATCH), make_inputs(LAYERS[0], device)
    with torch.no_grad():
        assert_near(module(src, src_key_padding_mask=padding), peer(src, src_key_padding_mask=padding))
    assert len(seen) == 2


def _fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the fused operations is called, from here on."""
    called: list[str] = []

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: called.append(name) or function(*arguments, **keywords)

    for module, name in (("_fusion", "add_layer_norm"), ("transformer", "mlp")):
        monkeypatch.setattr(f"fastattn.nn.{module}.{name}", watch(name, getattr(fastattn, name)))
    return called


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_fused(name: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = _fused_calls(monkeypatch)
    branches = 1 + 1 + LAYERS.index(name)
    norms = ["add_layer_norm"] * (branches - norm_first)
    module = make_layer(name, norm_first=norm_first, dropout=0.5)
    module(*make_inputs(name, "cpu"))
    assert called == norms
    called.clear()
    module.eval()(*make_inputs(name, "cpu"))
    assert sorted(called) == [*norms, "mlp"]


@pytest.mark.parametrize(
    "activation", [F.relu, F.gelu, torch.nn.GELU("tanh"), F.silu], ids=["relu", "gelu", "gelu_tanh", "silu"]
)
def test_linear_layers_apart_match(activation: Any, device: torch.device) -> None:
    """As with dropout between them, but that this drops nothing."""
    module, peer = layer_pair(LAYERS[0], device, activation=activation)
    module.dropout = torch.nn.AlphaDropout(0.0)
    assert_same(module, peer, call_layer, *make_inputs(LAYERS[0], device))


class _Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


@pytest.mark.parametrize("dropped", [False, True], ids=["fused", "apart"])
@pytest.mark.parametrize(
    ("activation", "function", "fused"),
    [
        (fastattn.gelu, F.gelu, True),
        (fastattn.nn.GELU("quick"), lambda x: x * torch.sigmoid(1.702 * x), True),
        (fastattn.nn.GELU(implementation="reference"), F.gelu, False),
        (torch.relu, F.relu, True),
        (torch.nn.SiLU(), F.silu, True),
        (_Unhashable(), F.relu, False),
    ],
    ids=["fastattn", "quick", "by_name", "torch.relu", "module", "unhashable"],
)
def test_activations_that_mlp_knows(
    activation: Any,
    function: Any,
    fused: bool,
    dropped: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, _ = layer_pair(LAYERS[0], device, activation=activation)
    _, peer = layer_pair(LAYERS[0], device, activation=function)
    if dropped:
        module.dropout = torch.nn.AlphaDropout(0.0)
    called = _fused_calls(monkeypatch)
    (x,) = make_inputs(LAYERS[0], device)
    assert_near(module(x), peer(x))
    assert ("mlp" in called) == (fused and not dropped)


class _DoubledLinear(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "norm": lambda m: setattr(m, "norm1", torch.nn.RMSNorm(EMBED)),
    "last_norm": lambda m: setattr(m, "norm2", torch.nn.RMSNorm(EMBED)),
    "dropout": lambda m: setattr(m, "dropout1", _Doubled()),
    "hidden_dropout": lambda m: setattr(m, "dropout", _Doubled()),
    "linear": lambda m: setattr(m, "linear1", torch.nn.Sequential(m.linear1, _Doubled())),
    "linear_of_another_class": lambda m: setattr(m.linear1, "__class__", _DoubledLinear),
    "hook": lambda m: m.linear2.register_forward_hook(lambda module, inputs, out: 2 * out),
    "norm_hook": lambda m: m.norm2.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,)),
    "own_forward": lambda m: setattr(m.linear1, "forward", lambda x: 2 * F.linear(x, m.linear1.weight)),
    "norms_own_forward": lambda m: setattr(m.norm2, "forward", lambda x: 2 * x),
    "parametrized": lambda m: parametrize.register_parametrization(m.linear1, "weight", _Doubled()),
    "activation": lambda m: setattr(m, "activation", torch.nn.Sequential(torch.nn.ReLU(), _Doubled())),
    "activation_hook": lambda m: (
        setattr(m, "activation", torch.nn.ReLU()),
        m.activation.register_forward_hook(lambda module, inputs, out: 2 * out),
    ),
    "attention": lambda m: setattr(
        m, "self_attn", torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True, bias=False)
    ),
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_are_called(change: str, norm_first: bool, device: torch.device) -> None:
    """Computing with their parameters instead would leave out an adapter or a hook, and nobody would know."""
    module, peer = layer_pair(LAYERS[0], device, norm_first=norm_first, implementation="torch")
    (x,) = make_inputs(LAYERS[0], device)
    before = module(x)
    for m in (module, peer):
        torch.manual_seed(0)
        CHANGES[change](m)
        m.to(device)
    assert_near(module(x), peer(x))
    assert not torch.allclose(module(x), before, atol=1e-3)


def test_hooks_of_all_modules_see_the_parts() -> None:
    """`register_module_forward_hook` watches every module; fused parts were not called."""
    module, peer = layer_pair(LAYERS[0], torch.device("cpu"), implementation="torch")
    (x,) = make_inputs(LAYERS[0], torch.device("cpu"))
    seen: list[list[str]] = []
    for m in (module, peer):
        names = {part: name for name, part in m.named_modules()}
        called: set[str] = set()
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda part, inputs, out, names=names, called=called: called.add(names.get(part, ""))
        )
        try:
            m(x)
        finally:
            hook.remove()
        seen.append(sorted(called))
    assert set(seen[0]) >= set(seen[1]) >= {"linear1", "norm1", "dropout1"}


def test_the_encoders_fast_path_can_be_turned_off() -> None:
    layer = make_layer(LAYERS[0])
    assert layer.activation_relu_or_gelu == 1
    layer.activation_relu_or_gelu = 0
    assert layer.activation_relu_or_gelu == 0
