"""Calls whose like was made before: the results that all checks and plans give, and none where those would differ."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton", reason="what is called again is a kernel")

import fastattn
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import forced_config
from fastattn.ops import _again as again_module
from fastattn.ops._again import Again
from fastattn.testing import make_tensor
from tests.again import taken_again

_again: Again = import_module("fastattn.ops.attention")._again


@pytest.fixture
def again() -> Iterator[list[Tensor]]:
    """The queries of calls that went past the checks."""
    with taken_again(_again) as taken:
        yield taken


def _qkv(device: torch.device, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"heads": 4, "kv_heads": 4, "seq_q": 20, "seq_k": 20, "dim": 16, "v_dim": 16} | changes
    shapes = (
        (2, sizes["heads"], sizes["seq_q"], sizes["dim"]),
        (2, sizes["kv_heads"], sizes["seq_k"], sizes["dim"]),
        (2, sizes["kv_heads"], sizes["seq_k"], sizes["v_dim"]),
    )
    if "heads_last" in changes:
        shapes = tuple((b, s, h, d) for b, h, s, d in shapes)
    made = [make_tensor(*shape, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    q, k, v = (t.transpose(1, 2) for t in made) if "heads_last" in changes else made
    if "expanded" in changes:
        q = q[:1, :1].expand_as(q)
    return q, k, v


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"causal": True}),
    "bottom-right": ({"seq_k": 37}, {"causal": "bottom_right"}),
    "top-left": ({"seq_k": 37}, {"causal": "top_left"}),
    "groups": ({"kv_heads": 2}, {"causal": True}),
    "v-wider": ({"v_dim": 24}, {}),
    "heads-last": ({"heads_last": True}, {"causal": True}),
    "heads-last-v-narrower": ({"heads_last": True, "v_dim": 8}, {}),
    "q-expanded": ({"expanded": True}, {}),
    "scale": ({}, {"scale": 0.7}),
    "lse": ({}, {"return_lse": True, "causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_and_layout(name: str, device: torch.device, again: list[Tensor]) -> None:
    sizes, options = CASES[name]
    for _ in range(4):
        tensors = _qkv(device, **sizes)
        found = fastattn.attention(*tensors, **options)
        expected = fastattn.attention(*tensors, **options, implementation="triton")
        for one, other in zip(
            *((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True
        ):
            assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
    assert len(again) == 2


def test_calls_that_differ_are_not_mistaken(device: torch.device, again: list[Tensor]) -> None:
    """By anything in the key: each of the calls is made twice, in turn, and right both times."""
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    for sizes, options in CASES.values():
        calls.append((_qkv(device, **sizes), {n: x for n, x in options.items() if n != "return_lse"}))
    q, k, v = _qkv(device)
    wide = make_tensor(2, 4, 20, 48, device=device)
    calls += [((wide[..., :16], k, v), {}), ((q, wide[..., :16], v), {}), ((q, k, wide[..., 16:32]), {})]
    calls += [((q.half(), k.half(), v.half()), {}), ((q, k, v), {"scale": -0.7})]
    expected = [fastattn.attention(*t, **options, implementation="reference") for t, options in calls]
    for _ in range(3):
        for (tensors, options), right in zip(calls, expected, strict=True):
            tolerance = 2e-3 if tensors[0].dtype == torch.float16 else 1e-4
            torch.testing.assert_close(
                fastattn.attention(*tensors, **options), right, atol=tolerance, rtol=tolerance
            )
    # "lse" is "causal" once more.
    assert len(again) == len(calls) + 2


def test_errors_are_those_of_the_first_call(device: torch.device, again: list[Tensor]) -> None:
    q, k, v = _qkv(device)
    for scale in (None, 0.5):
        for causal in (False, True):
            for _ in range(2):
                fastattn.attention(q, k, v, causal=causal, scale=scale)
    for _ in range(3):  # what launches a call is learned the second time
        with pytest.raises(ValueError, match="causal=1 must be"):
            fastattn.attention(q, k, v, causal=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="causal=\\[\\] must be"):
            fastattn.attention(q, k, v, causal=[])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scale=nan must be"):
            fastattn.attention(q, k, v, scale=float("nan"))
        with pytest.raises(ValueError, match=r"scale=Fraction\(1, 2\) must be"):
            fastattn.attention(q, k, v, scale=Fraction(1, 2))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="one dtype"):
            fastattn.attention(q, k.half(), v)
        with pytest.raises(TypeError, match="k must be a torch\\.Tensor, not list"):
            fastattn.attention(q, k.tolist(), v)
        with pytest.raises(ValueError, match="3, 4 and 4 dimensions"):
            fastattn.attention(q[0], k, v)
        with pytest.raises(ValueError, match="k has shape"):
            fastattn.attention(q, k, v[:, :, 1:])
        with pytest.raises(ValueError, match="k has head_dim=8"):
            fastattn.attention(q, k[..., :8], v)  # whose strides are k's
    assert again == []


def test_gradients_are_recorded(device: torch.device, again: list[Tensor]) -> None:
    q, k, v = _qkv(device)
    for _ in range(3):
        fastattn.attention(q, k, v)
    for place in range(3):
        tensors = [t.clone().requires_grad_(n == place) for n, t in enumerate((q, k, v))]
        assert fastattn.attention(*tensors).requires_grad
        with torch.no_grad():
            assert not fastattn.attention(*tensors).requires_grad
    assert len(again) == 1 + 3


class _Subclass(Tensor):
    pass


class _Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operator(device: torch.device, again: list[Tensor]) -> None:
    q, k, v = _qkv(device)
    expected = [fastattn.attention(q, k, v) for _ in range(3)][1]
    with _Mode() as mode:
        fastattn.attention(q, k, v)
    assert "fastattn.attention_forward.default" in mode.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastattn.attention(q, k, v)
    assert "fastattn::attention_forward" in [event.key for event in profile.key_averages()]
    found = fastattn.attention(q.as_subclass(_Subclass), k, v)
    torch.testing.assert_close(found.as_subclass(Tensor), expected)
    negative = torch.complex(q, -q).conj().imag  # q, as the negative of what lies in memory
    assert negative.is_neg()
    torch.testing.assert_close(fastattn.attention(negative, k, v), expected)
    assert len(again) == 1


def test_what_decides_outside_of_the_arguments(device: torch.device, again: list[Tensor]) -> None:
    q, k, v = _qkv(device)
    expected = [fastattn.attention(q, k, v) for _ in range(3)][1]
    with torch.autocast(device.type, dtype=torch.float16):
        assert fastattn.attention(q, k, v).dtype == torch.float16
    with fastattn.use_implementation("reference"):
        torch.testing.assert_close(fastattn.attention(q, k, v), expected, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert forward_ad.unpack_dual(fastattn.attention(dual, k, v)).tangent is not None
    with sdpa_kernel(SDPBackend.MATH):
        mapped = torch.func.vmap(lambda x: fastattn.attention(x, k, v))(q[None])
    torch.testing.assert_close(mapped[0], expected, atol=1e-5, rtol=1e-5)
    assert len(again) == 1


def test_few_queries_and_options_are_not_kept(device: torch.device, again: list[Tensor]) -> None:
    q, k, v = _qkv(device)
    for _ in range(3):
        fastattn.attention(q[:, :, :1], k, v)
        fastattn.attention(q, k, v, window=(3, 0))
        fastattn.attention(q[:, :, :0], k, v)
        fastattn.attention(q.double(), k.double(), v.double())
    assert again == []


def test_other_configs_are_taken_at_once(device: torch.device) -> None:
    """Tuning forces configs between two calls: what was known is forgotten with the plans."""
    q, k, v = _qkv(device)
    fastattn.attention(q, k, v), fastattn.attention(q, k, v)
    (before,) = (run for key, run in _again.known().items() if key[0][0] == q.shape)
    tiles = AttentionTiles(16, 16, 1, 1)
    config = AttentionConfig(tiles, tiles, tiles, delta=tiles)
    with forced_config(select_attention_config, config):
        assert not _again.known()
        fastattn.attention(q, k, v), fastattn.attention(q, k, v)
        (forced,) = _again.known().values()
    assert forced.constants["BLOCK_M"] == 16 and forced.grid != before.grid
    assert not _again.known()


def test_not_more_is_known_than_is_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again_module, "_MOST_KNOWN", 3)
    for seq in range(17, 24):
        fastattn.attention(*_qkv(device, seq_q=seq, heads=1, kv_heads=1))
        assert 1 <= len(_again.known()) <= 3
