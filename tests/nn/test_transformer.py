"""The layers of a Transformer give torch.nn's numbers: values, gradients, masks, compiled and exported."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import assert_accurate, make_tensor
from tests.models.agreement import assert_near, compile_whole
from tests.nn.layers import (
    BATCH,
    EMBED,
    HEADS,
    LAYERS,
    SEQ,
    SEQ_MEMORY,
    call_layer,
    layer_pair,
    make_inputs,
    make_layer,
)
from tests.nn.pairs import IMPLEMENTATIONS, assert_same, causal_mask, make_pair, padding_mask


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
    module, peer = layer_pair(name, device, **VARIANTS[variant])
    inputs = make_inputs(name, device)
    if not module.self_attn.batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    assert_same(module, peer, call_layer, *inputs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("name", LAYERS)
def test_matches_by_name(name: str, implementation: str, norm_first: bool, device: torch.device) -> None:
    module, peer = layer_pair(name, device, norm_first=norm_first, implementation=implementation)
    assert_same(module, peer, call_layer, *make_inputs(name, device))


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched_matches(name: str, device: torch.device) -> None:
    module, peer = layer_pair(name, device, batch_first=False)
    assert_same(module, peer, call_layer, *(t[0] for t in make_inputs(name, device)))


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
    module, peer = layer_pair(name, device, norm_first=norm_first, activation="gelu", dtype=torch.bfloat16)
    truth = copy.deepcopy(peer).double()
    _assert_as_accurate(module, peer, truth, make_inputs(name, device, torch.bfloat16))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_matches_and_drops_nothing(
    name: str, activation: str, norm_first: bool, device: torch.device
) -> None:
    """torch.nn's encoder layer takes another path there, an operator of its own."""
    module, peer = layer_pair(name, device, norm_first=norm_first, activation=activation, dropout=0.5)
    module.eval(), peer.eval()
    with torch.no_grad():
        assert_near(module(*make_inputs(name, device)), peer(*make_inputs(name, device)))


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
    module, peer = layer_pair(LAYERS[0], device, implementation="torch")
    masks = _self_masks(device)[case]
    assert_same(module, peer, lambda m, x: m(x, *masks), *make_inputs(LAYERS[0], device))


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_the_decoder_match(case: str, device: torch.device) -> None:
    """Each mask of the self-attention together with some of the memory's."""
    module, peer = layer_pair(LAYERS[1], device, norm_first=True, implementation="torch")
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

    assert_same(module, peer, call, *make_inputs(LAYERS[1], device))


def test_causal_hints_need_no_mask(device: torch.device) -> None:
    encoder, decoder = (make_layer(name, device) for name in LAYERS)
    tgt, memory = make_inputs(LAYERS[1], device)
    causal = causal_mask(SEQ, device)
    assert_near(encoder(tgt, is_causal=True), encoder(tgt, causal))
    sees = torch.ones(SEQ, SEQ_MEMORY, dtype=torch.bool, device=device).triu(1)
    hinted = decoder(tgt, memory, tgt_is_causal=True, memory_is_causal=True)
    assert_near(hinted, decoder(tgt, memory, causal, sees))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_matches(name: str, norm_first: bool, device: torch.device) -> None:
    """The stream stays float32, and what branches read of it is narrow; some roundings to bfloat16 on their way."""
    module, peer = layer_pair(name, device, norm_first=norm_first)
    results, read = [], []
    for m in (module, peer):
        inputs = [t.requires_grad_() for t in make_inputs(name, device)]
        hook = m.self_attn.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].dtype))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = m(*inputs)
        hook.remove()
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *m.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected, 8 * 2.0**-8)
    assert read[0] == (torch.bfloat16 if norm_first else torch.float32)
    assert not torch.equal(results[0][0], module(*inputs))


def test_autocast_leaves_float64(device: torch.device) -> None:
    module, peer = layer_pair(LAYERS[0], device, norm_first=True, dtype=torch.float64)
    (src,) = make_inputs(LAYERS[0], device, torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_near(module(src), peer(src))


@pytest.mark.parametrize(("norm_first", "dropout"), [(False, 0.0), (True, 0.2)], ids=["post", "pre-dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_in_one_graph_for_all_sizes(name: str, norm_first: bool, dropout: float) -> None:
    """Once for any batch and lengths."""
    module = make_layer(name, norm_first=norm_first, dropout=dropout, implementation="torch")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    compiled = compile_whole(module, backend, dynamic=True)
    # 300: above the number of scores from which eager attention would take another form.
    for batch, seq in ((2, 5), (3, 6), (4, 9), (2, 300)):
        inputs = [
            make_tensor(batch, n, EMBED, seed=n) for n in (seq, seq + 2)[: len(make_inputs(name, "cpu"))]
        ]
        torch.manual_seed(1)
        out = compiled(*inputs)
        torch.manual_seed(1)
        assert_near(out, module(*inputs))
    assert len(graphs) == 1


def test_the_kernels_compile_in_one_graph(device: torch.device) -> None:
    module = make_layer(LAYERS[0], device, dropout=0.2, norm_first=True, implementation="triton")
    (src,) = make_inputs(LAYERS[0], device)
    torch.manual_seed(1)
    out = compile_whole(module)(src)
    torch.manual_seed(1)
    assert_near(out, module(src))


@pytest.mark.parametrize("name", LAYERS)
def test_exports(name: str, device: torch.device) -> None:
    module = make_layer(name, device, implementation="torch").eval()
    inputs = tuple(make_inputs(name, device))
    assert_near(torch.export.export(module, inputs).module()(*inputs), module(*inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_exports_for_all_sizes(name: str) -> None:
    """A comparison of sizes whose outcome was not used bound the exported lengths from above."""
    module = make_layer(name, implementation="torch").eval()
    inputs = tuple(make_inputs(name, "cpu"))
    batch = torch.export.Dim("batch", min=2)
    lengths = [torch.export.Dim(f"seq{n}", min=2) for n in range(len(inputs))]
    dims = tuple({0: batch, 1: length} for length in lengths)
    exported = torch.export.export(module, inputs, dynamic_shapes=dims).module()
    longer = [make_tensor(3, 300 + n, EMBED, seed=n) for n in range(len(inputs))]
    assert_near(exported(*longer), module(*longer))


def test_functional_calls_and_transforms(device: torch.device) -> None:
    """Within torch.func PyTorch's operators run, whose gradients it sees."""
    module, peer = layer_pair(LAYERS[0], device)
    (x,) = make_inputs(LAYERS[0], device)
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
    encoder, decoder = (make_layer(name, device) for name in LAYERS)
    tgt, memory = make_inputs(LAYERS[1], device)
    with pytest.raises(ValueError, match="query has width 15; embed_dim=16 is needed"):
        encoder(tgt[..., 1:])
    with pytest.raises(ValueError, match="have 4, 4 and 4 dimensions; all need 3, or 2"):
        encoder(tgt[None])
    with pytest.raises(ValueError, match="query has batch=2, but key has batch=1"):
        decoder(tgt, memory[:1])
    with pytest.raises(fastattn.NotSupported, match="implementation='triton'"):
        make_layer(LAYERS[0], dtype=torch.float64, implementation="triton")(tgt.double())
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        make_layer(LAYERS[0], implementation="fast")(tgt)


@pytest.mark.parametrize("name", LAYERS)
def test_empty(name: str, device: torch.device) -> None:
    module = make_layer(name, device)
    for shape in ((0, SEQ, EMBED), (BATCH, 0, EMBED)):
        x = torch.zeros(shape, device=device)
        assert module(*[x] * len(make_inputs(name, device))).shape == shape


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
    shapes = [(4, 333, 512), (4, 250, 512)][: len(make_inputs(name, device))]
    inputs = [make_tensor(*shape, device=device, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]
    _assert_as_accurate(module, peer, truth, inputs)
