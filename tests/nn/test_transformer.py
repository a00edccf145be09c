"""The layers of a Transformer give torch.nn's numbers from its state dicts, alone and inside its stacks."""

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
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.testing import assert_accurate, make_tensor
from tests.models.agreement import assert_near, compile_whole
from tests.nn.pairs import IMPLEMENTATIONS, assert_same, causal_mask, make_pair, padding_mask

EMBED, HEADS, HIDDEN, BATCH, SEQ, SEQ_MEMORY = 16, 2, 24, 2, 5, 7
LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


def _pair(name: str, device: torch.device, **keywords: Any) -> tuple[Any, Any]:
    """Both layers, without dropout unless it is asked for, batch first and of post-norm as torch.nn's is by default."""
    keywords = {"dropout": 0.0, "batch_first": True, **keywords}
    sizes = (EMBED, HEADS, HIDDEN)
    return make_pair(getattr(fastattn.nn, name), getattr(torch.nn, name), device, *sizes, **keywords)


def _layer(name: str, device: torch.device | str = "cpu", **keywords: Any) -> Any:
    return _pair(name, torch.device(device), **keywords)[0]


def _inputs(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """src, or tgt and memory."""
    lengths = (SEQ,) if name == LAYERS[0] else (SEQ, SEQ_MEMORY)
    shapes = [(BATCH, length, EMBED) for length in lengths]
    return [make_tensor(*shape, device=device, seed=n, dtype=dtype) for n, shape in enumerate(shapes, 40)]


def _call(m: torch.nn.Module, *inputs: Tensor) -> Tensor:
    return m(*inputs)


def _cubed(x: Tensor) -> Tensor:
    return 0.1 * x**3


VARIANTS: dict[str, dict[str, Any]] = {
    "post-relu": {},
    "post-gelu": {"activation": "gelu"},
    "post-silu": {"activation": F.silu, "layer_norm_eps": 0.5},
    "post-no_bias": {"bias": False, "activation": F.gelu},
    "pre-relu-seq_first": {"norm_first": True, "batch_first": False},
    "pre-gelu_tanh": {"norm_first": True, "activation": torch.nn.GELU("tanh")},
    "pre-function": {"norm_first": True, "activation": _cubed, "layer_norm_eps": 0.5},
    "pre-no_bias": {"norm_first": True, "bias": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_matches(name: str, variant: str, device: torch.device) -> None:
    """Output and every gradient, in training without dropout."""
    module, peer = _pair(name, device, **VARIANTS[variant])
    inputs = _inputs(name, device)
    if not module.self_attn.batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    assert_same(module, peer, _call, *inputs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("name", LAYERS)
def test_matches_by_name(name: str, implementation: str, norm_first: bool, device: torch.device) -> None:
    module, peer = _pair(name, device, norm_first=norm_first, implementation=implementation)
    assert_same(module, peer, _call, *_inputs(name, device))


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched_matches(name: str, device: torch.device) -> None:
    module, peer = _pair(name, device, batch_first=False)
    assert_same(module, peer, _call, *(t[0] for t in _inputs(name, device)))


def _assert_as_accurate(module: Any, peer: Any, truth: Any, inputs: list[Tensor]) -> None:
    """Output and every gradient, of the sums over all rows as they grow."""
    results = []
    for m in (module, peer, truth):
        dtype = next(m.parameters()).dtype
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = m(*leaves)
        out.backward(make_tensor(*out.shape, seed=99, dtype=inputs[0].dtype, device=out.device).to(dtype))
        results.append({"output": out, **{f"input {n}": t.grad for n, t in enumerate(leaves)}})
        results[-1].update({n: p.grad for n, p in m.named_parameters()})
    for what, found in results[0].items():
        three = [found, results[1][what], results[2][what]]
        if what.endswith("in_proj_bias"):
            # The keys' share is 0, and what is computed of it rounding.
            q, _, v = zip(*(t.chunk(3) for t in three), strict=True)
            three = [torch.cat(parts) for parts in zip(q, v, strict=True)]
        assert_accurate(*three, name=what)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_as_accurate(name: str, norm_first: bool, device: torch.device) -> None:
    module, peer = _pair(name, device, norm_first=norm_first, activation="gelu", dtype=torch.bfloat16)
    truth = copy.deepcopy(peer).double()
    _assert_as_accurate(module, peer, truth, _inputs(name, device, torch.bfloat16))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_matches_and_drops_nothing(
    name: str, activation: str, norm_first: bool, device: torch.device
) -> None:
    """torch.nn's encoder layer takes another path there, an operator of its own."""
    module, peer = _pair(name, device, norm_first=norm_first, activation=activation, dropout=0.5)
    module.eval(), peer.eval()
    with torch.no_grad():
        assert_near(module(*_inputs(name, device)), peer(*_inputs(name, device)))


def _self_masks(device: torch.device) -> dict[str, tuple[Tensor | None, Tensor | None, bool]]:
    """Mask, padding mask and hint of a self-attention."""
    padding, causal = padding_mask(SEQ, device, BATCH), causal_mask(SEQ, device)
    per_head = make_tensor(BATCH * HEADS, SEQ, SEQ, device=device)
    float_padding = torch.zeros(BATCH, SEQ, device=device).masked_fill(padding, -2.0)
    float_causal = torch.zeros(SEQ, SEQ, device=device).masked_fill(causal, -torch.inf)
    return {
        "padding": (None, padding, False),
        "float_padding": (None, float_padding, False),
        "mask": (causal, None, False),
        "float_mask": (make_tensor(SEQ, SEQ, device=device), None, False),
        "mask_per_head": (per_head > 1.0, None, False),
        "mask_and_padding": (causal, padding, False),
        "float_mask_and_padding": (per_head, float_padding, False),
        "causal": (causal, None, True),
        "float_causal_and_padding": (float_causal, float_padding, True),
    }


MASKS = tuple(_self_masks(torch.device("cpu")))


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_the_encoder_match(case: str, device: torch.device) -> None:
    module, peer = _pair(LAYERS[0], device, implementation="torch")
    masks = _self_masks(device)[case]
    assert_same(module, peer, lambda m, x: m(x, *masks), *_inputs(LAYERS[0], device))


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_the_decoder_match(case: str, device: torch.device) -> None:
    """Each mask of the self-attention together with some of the memory's."""
    module, peer = _pair(LAYERS[1], device, norm_first=True, implementation="torch")
    tgt_mask, tgt_padding, tgt_is_causal = _self_masks(device)[case]
    memory_masks = {
        "memory_mask": make_tensor(SEQ, SEQ_MEMORY, device=device) > 0.5,
        "memory_key_padding_mask": padding_mask(SEQ_MEMORY, device, BATCH),
    }
    if tgt_padding is None:
        memory_masks.popitem()
    if tgt_mask is None:
        memory_masks.pop("memory_mask")

    def call(m: torch.nn.Module, tgt: Tensor, memory: Tensor) -> Tensor:
        masks = {"tgt_key_padding_mask": tgt_padding, "tgt_is_causal": tgt_is_causal, **memory_masks}
        return m(tgt, memory, tgt_mask, **masks)

    assert_same(module, peer, call, *_inputs(LAYERS[1], device))


def test_causal_hints_need_no_mask(device: torch.device) -> None:
    encoder, decoder = (_layer(name, device) for name in LAYERS)
    tgt, memory = _inputs(LAYERS[1], device)
    causal = causal_mask(SEQ, device)
    assert_near(encoder(tgt, is_causal=True), encoder(tgt, causal))
    sees = torch.ones(SEQ, SEQ_MEMORY, dtype=torch.bool, device=device).triu(1)
    hinted = decoder(tgt, memory, tgt_is_causal=True, memory_is_causal=True)
    assert_near(hinted, decoder(tgt, memory, causal, sees))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_matches(name: str, norm_first: bool, device: torch.device) -> None:
    """The stream stays float32, and so do the sums; three roundings to bfloat16 and more on the way of a branch."""
    module, peer = _pair(name, device, norm_first=norm_first)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, expected = module(*_inputs(name, device)), peer(*_inputs(name, device))
    assert out.dtype == expected.dtype == torch.float32
    assert_near(out, expected, 4 * 2.0**-8)
    assert not torch.equal(out, module(*_inputs(name, device)))


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
    assert "norm_first=True" in repr(module) and "norm_first" not in repr(_layer(name))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles(name: str, device: torch.device) -> None:
    module = _layer(name, device, norm_first=True, activation="gelu")
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    expected = module(*_inputs(name, device))
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    )
    for copied in copies:
        assert type(copied) is type(module)
        assert torch.equal(copied(*_inputs(name, device)), expected)


STACKS = {LAYERS[0]: torch.nn.TransformerEncoder, LAYERS[1]: torch.nn.TransformerDecoder}


@pytest.mark.parametrize("name", LAYERS)
def test_inside_torch_nns_stacks(name: str, device: torch.device) -> None:
    pair = _pair(name, device, implementation="torch")
    module, peer = (STACKS[name](layer, 2) for layer in pair)
    causal = causal_mask(SEQ, device)

    def call(m: torch.nn.Module, *inputs: Tensor) -> Tensor:
        return m(*inputs, causal)

    assert_same(module, peer, call, *_inputs(name, device))


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
    for layer in _pair(LAYERS[0], torch.device("cpu"), **keywords):
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
        for layer in _pair(LAYERS[0], device, activation=activation)
    )
    seen = []
    nested = fastattn.nn.TransformerEncoderLayer._nested
    monkeypatch.setattr(
        fastattn.nn.TransformerEncoderLayer, "_nested", lambda *a: seen.append(1) or nested(*a)
    )
    padding, (src,) = padding_mask(SEQ, device, BATCH), _inputs(LAYERS[0], device)
    with torch.no_grad():
        assert_near(module(src, src_key_padding_mask=padding), peer(src, src_key_padding_mask=padding))
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("layout", "norm_first", "is_causal"),
    [(torch.strided, False, False), (torch.jagged, True, True)],
    ids=["strided-post-full", "jagged-pre-causal"],
)
def test_nested_tensors_are_sequences_alone(
    layout: torch.layout, norm_first: bool, is_causal: bool, device: torch.device
) -> None:
    """With gradients, which torch.nn's layer has none of here."""
    module = _layer(LAYERS[0], device, norm_first=norm_first)
    found = []
    for nested in (True, False):
        rows = [make_tensor(n, EMBED, device=device, seed=n).requires_grad_() for n in (3, 1, 5)]
        if nested:
            src = torch.nested.as_nested_tensor(rows, layout=layout)
            out = module(src, is_causal=is_causal)
            assert out.is_nested and out.layout == layout
            outs = out.unbind()
        else:
            outs = [module(row, is_causal=is_causal) for row in rows]
        module.zero_grad()
        sum((out * make_tensor(*out.shape, device=device, seed=9)).sum() for out in outs).backward()
        gradients = [t.grad for t in (*rows, *module.parameters())]
        found.append([*outs, *gradients])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def _fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the fused operations is called, from here on."""
    called: list[str] = []

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: called.append(name) or function(*arguments, **keywords)

    for name in ("add_layer_norm", "mlp"):
        monkeypatch.setattr(f"fastattn.nn.transformer.{name}", watch(name, getattr(fastattn, name)))
    return called


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_fused(name: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = _fused_calls(monkeypatch)
    branches = 1 + 1 + LAYERS.index(name)
    norms = ["add_layer_norm"] * (branches - norm_first)
    module = _layer(name, norm_first=norm_first, dropout=0.5)
    module(*_inputs(name, "cpu"))
    assert called == norms
    called.clear()
    module.eval()(*_inputs(name, "cpu"))
    assert sorted(called) == [*norms, "mlp"]


@pytest.mark.parametrize(
    "activation", [F.relu, F.gelu, torch.nn.GELU("tanh"), F.silu], ids=["relu", "gelu", "gelu_tanh", "silu"]
)
def test_linear_layers_apart_match(activation: Any, device: torch.device) -> None:
    """As with dropout between them, but that this drops nothing."""
    module, peer = _pair(LAYERS[0], device, activation=activation)
    module.dropout = torch.nn.Identity()
    assert_same(module, peer, _call, *_inputs(LAYERS[0], device))


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
    module, _ = _pair(LAYERS[0], device, activation=activation)
    _, peer = _pair(LAYERS[0], device, activation=function)
    if dropped:
        module.dropout = torch.nn.Identity()
    called = _fused_calls(monkeypatch)
    (x,) = _inputs(LAYERS[0], device)
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
    module, peer = _pair(LAYERS[0], device, norm_first=norm_first, implementation="torch")
    (x,) = _inputs(LAYERS[0], device)
    before = module(x)
    for m in (module, peer):
        torch.manual_seed(0)
        CHANGES[change](m)
        m.to(device)
    assert_near(module(x), peer(x))
    assert not torch.allclose(module(x), before, atol=1e-3)


def _only(site: str, p: float, device: torch.device) -> tuple[Any, Tensor]:
    """An encoder layer of pre-norm whose output less its input shows one dropout's factors, and the input."""
    layer = _layer(LAYERS[0], device, norm_first=True)
    branch = torch.zeros(EMBED, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        if site == "dropout1":
            layer.self_attn.out_proj.bias.fill_(1.0)
        elif site == "dropout2":
            layer.linear2.bias.fill_(1.0)
        else:
            layer.linear1.bias.fill_(1.0)
            layer.linear2.weight.copy_(torch.eye(EMBED, HIDDEN))
    getattr(layer, site).p = p
    return layer, branch.expand(1, 40, EMBED)


@pytest.mark.parametrize("site", ["dropout1", "dropout", "dropout2"])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_drops_and_scales(site: str, p: float, device: torch.device) -> None:
    """Each place of three, of 640 elements: the share is off by less than 5 of its standard deviations."""
    layer, x = _only(site, p, device)
    found = layer(x)
    if p == 1.0:
        assert not found.any()
        return
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation
    assert not torch.equal(layer(x), found)
    torch.testing.assert_close(layer.eval()(x), torch.ones_like(x))


@pytest.mark.parametrize(("name", "norm_first"), [(LAYERS[0], True), (LAYERS[1], False)], ids=["pre", "post"])
def test_one_seed_drops_the_same_and_checkpointing_does(
    name: str, norm_first: bool, device: torch.device
) -> None:
    module = _layer(name, device, norm_first=norm_first, dropout=0.3)
    found = []
    for call in (module, module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        inputs = [t.requires_grad_() for t in _inputs(name, device)]
        torch.manual_seed(5)
        out = call(*inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(module(*inputs), found[0][0])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_with_dropout_are_those_of_what_was_dropped(name: str, norm_first: bool) -> None:
    """In float64, by PyTorch's operators: every place drops, from one seed the same."""
    module = _layer(name, norm_first=norm_first, dropout=0.3, activation="gelu", dtype=torch.float64)
    inputs = [t.requires_grad_() for t in _inputs(name, "cpu", torch.float64)]
    parameters = list(module.parameters())

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return module(*tensors[: len(inputs)])

    assert torch.autograd.gradcheck(call, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_the_kernels_gradients_with_dropout(norm_first: bool, device: torch.device) -> None:
    """The change of a sum along a direction, which the kernels' gradients foretell."""
    layer = _layer(LAYERS[1], device, norm_first=norm_first, dropout=0.3, activation="gelu")
    inputs = [t.requires_grad_() for t in _inputs(LAYERS[1], device)]
    leaves = [*inputs, *layer.parameters()]
    weights = make_tensor(*inputs[0].shape, seed=77, device=device)

    def value() -> Tensor:
        torch.manual_seed(5)
        return (layer(*inputs) * weights).sum(dtype=torch.float64)

    directions = [make_tensor(*t.shape, seed=n, device=device) for n, t in enumerate(leaves)]
    gradients = torch.autograd.grad(value(), leaves)
    foretold = sum((g.double() * d.double()).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
            values.append(value())
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf -= step * direction
    found = (values[0] - values[1]) / 2e-3
    torch.testing.assert_close(found, foretold, atol=0.0, rtol=5e-3)


@pytest.mark.parametrize(("norm_first", "dropout"), [(False, 0.0), (True, 0.2)], ids=["post", "pre-dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_in_one_graph_for_all_sizes(name: str, norm_first: bool, dropout: float) -> None:
    """Once for any batch and lengths."""
    module = _layer(name, norm_first=norm_first, dropout=dropout, implementation="torch")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    compiled = compile_whole(module, backend, dynamic=True)
    for batch, seq in ((2, 5), (3, 6), (4, 9)):
        inputs = [make_tensor(batch, n, EMBED, seed=n) for n in (seq, seq + 2)[: len(_inputs(name, "cpu"))]]
        torch.manual_seed(1)
        out = compiled(*inputs)
        torch.manual_seed(1)
        assert_near(out, module(*inputs))
    assert len(graphs) == 1


def test_the_kernels_compile_in_one_graph(device: torch.device) -> None:
    module = _layer(LAYERS[0], device, dropout=0.2, norm_first=True, implementation="triton")
    (src,) = _inputs(LAYERS[0], device)
    torch.manual_seed(1)
    out = compile_whole(module)(src)
    torch.manual_seed(1)
    assert_near(out, module(src))


@pytest.mark.parametrize("name", LAYERS)
def test_exports(name: str, device: torch.device) -> None:
    module = _layer(name, device, implementation="torch").eval()
    inputs = tuple(_inputs(name, device))
    assert_near(torch.export.export(module, inputs).module()(*inputs), module(*inputs))


def test_functional_calls_and_transforms(device: torch.device) -> None:
    """Within torch.func PyTorch's operators run, whose gradients it sees."""
    module, peer = _pair(LAYERS[0], device)
    (x,) = _inputs(LAYERS[0], device)
    gradients = []
    for m in (module, peer):
        parameters = {name: p.detach() for name, p in m.named_parameters()}

        def loss(parameters: dict[str, Tensor], m: torch.nn.Module = m) -> Tensor:
            return torch.func.functional_call(m, parameters, (x,)).square().mean()

        gradients.append(torch.func.grad(loss)(parameters))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    for layer in (getattr(fastattn.nn, name) for name in LAYERS):
        with pytest.raises(ValueError, match="embed_dim=16 must be divisible by num_heads=3"):
            layer(EMBED, 3)
        with pytest.raises(ValueError, match="activation='tanh' must be 'relu', 'gelu' or a function"):
            layer(EMBED, HEADS, activation="tanh")
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            layer(EMBED, HEADS, dropout=1.5)
    encoder, decoder = (_layer(name, device) for name in LAYERS)
    tgt, memory = _inputs(LAYERS[1], device)
    with pytest.raises(ValueError, match="query has width 15; embed_dim=16 is needed"):
        encoder(tgt[..., 1:])
    with pytest.raises(ValueError, match="have 4, 4 and 4 dimensions; all need 3, or 2"):
        encoder(tgt[None])
    with pytest.raises(ValueError, match="query has batch=2, but key has batch=1"):
        decoder(tgt, memory[:1])
    with pytest.raises(fastattn.NotSupported, match="implementation='triton'"):
        _layer(LAYERS[0], dtype=torch.float64, implementation="triton")(tgt.double())
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        _layer(LAYERS[0], implementation="fast")(tgt)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_not_taken() -> None:
    encoder, decoder = (_layer(name) for name in LAYERS)
    nested = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(2, EMBED)])
    for masks, named in (
        ({"src_mask": torch.zeros(3, 3)}, "src_mask"),
        ({"src_key_padding_mask": torch.zeros(2, 3)}, "src_key_padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"{named} goes with no nested tensor"):
            encoder(nested, **masks)
    with pytest.raises(fastattn.NotSupported, match="a nested tgt or memory is not supported"):
        decoder(nested, nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("lengths", [(), (0,), (2, 0)], ids=str)
def test_empty_nested_tensors(lengths: tuple[int, ...], device: torch.device) -> None:
    src = torch.nested.nested_tensor([make_tensor(n, EMBED, device=device) for n in lengths], device=device)
    out = _layer(LAYERS[0], device)(src)
    assert out.is_nested and [row.shape for row in out.unbind()] == [row.shape for row in src.unbind()]


@pytest.mark.parametrize("name", LAYERS)
def test_empty(name: str, device: torch.device) -> None:
    module = _layer(name, device)
    for shape in ((0, SEQ, EMBED), (BATCH, 0, EMBED)):
        x = torch.zeros(shape, device=device)
        assert module(*[x] * len(_inputs(name, device))).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_real_sizes(name: str, norm_first: bool, dtype: torch.dtype, device: torch.device) -> None:
    keywords = {
        "batch_first": True,
        "norm_first": norm_first,
        "dtype": dtype,
        "activation": "gelu",
        "dropout": 0.0,
    }
    module, peer = make_pair(
        getattr(fastattn.nn, name), getattr(torch.nn, name), device, 512, 8, 2048, **keywords
    )
    with torch.no_grad():
        for m in (module, peer):
            for parameter in m.parameters():
                if parameter.dim() == 2:
                    parameter *= 3 * parameter.size(1) ** -0.5
    truth = copy.deepcopy(peer).double()
    shapes = [(4, 333, 512), (4, 250, 512)][: len(_inputs(name, device))]
    inputs = [make_tensor(*shape, device=device, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]
    _assert_as_accurate(module, peer, truth, inputs)
