"""Every launch of many calls made twice, as we make it and by Triton alone: the same code on the same arguments.

A process of its own, as kernels are compiled in it, for a device that is not there.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import fastattn
import fastattn.kernels
from benchmarks.launch_cost import without_device
from benchmarks.providers.attention_forms import _FormFunction
from fastattn.kernels import _launch
from fastattn.kernels._attention_forms import select_attention_form
from fastattn.kernels._target import KNOWN_TARGETS

# What reached the driver: the compiled code, the grid and the arguments.
_reached: list[tuple[Any, ...]] = []
# How many launches were compared, and how many of them did not go through Triton's `kernel[grid]`.
_counts = {"compared": 0, "kept": 0}


def _launcher_of(source: Any, metadata: Any) -> Callable[..., None]:
    def launch(*arguments: Any) -> None:
        x, y, z, _stream, _function, _packed, _metadata, _enter, _exit, *values = arguments
        _reached.append((metadata.hash, (x, y, z), values))

    return launch


def _twice(launch: Callable[..., None]) -> Callable[..., None]:
    def compared(kernel: Any, grid: Any, constants: Any, /, **arguments: Any) -> None:
        known = len(constants.launched)
        _reached.clear()
        launch(kernel, grid, constants, **arguments)
        _counts["compared"] += 1
        _counts["kept"] += known > 0 and len(constants.launched) == known
        values = {n: value for n, value in arguments.items() if n not in ("by", "scratch")}
        kernel[grid](**{**constants, **values})
        ours, triton = _reached
        assert ours[:2] == triton[:2], f"{kernel.__name__}: other code, or another grid"
        assert _same(ours[2], triton[2]), f"{kernel.__name__}: {ours[2]} for {triton[2]}"

    return compared


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return one is other
    return bool(getattr(one, "value", one) == getattr(other, "value", other))


def _at(offset: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that begins so many elements behind an address that 16 bytes divide."""
    room = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)
    return room[offset:].view(shape).requires_grad_(dtype.is_floating_point)


def _calls() -> Iterator[Callable[[], Tensor]]:
    """Calls of which each repeats the shapes of others, with other addresses, dtypes, options or tensors left out."""
    for offset in (0, 8, 1, 0):
        yield lambda o=offset: fastattn.gelu(_at(o, 4, 32))
        yield lambda o=offset: fastattn.swiglu(_at(0, 4, 32), _at(o, 4, 32))
        yield lambda o=offset: fastattn.bias_gelu(_at(o, 4, 32), _at(0, 32))
        yield lambda o=offset: fastattn.layer_norm(_at(0, 4, 32), (32,), _at(o, 32), _at(0, 32))
        yield lambda o=offset: fastattn.layer_norm(_at(0, 4, 32), (32,), _at(o, 32))
        yield lambda o=offset: fastattn.rms_norm(_at(o, 4, 32), (32,), _at(0, 32, dtype=torch.float32))
        target = torch.arange(4)
        yield lambda o=offset, t=target: fastattn.cross_entropy(_at(o, 4, 32), t)
        yield lambda o=offset, t=target: fastattn.cross_entropy(_at(o, 4, 32), t, label_smoothing=0.1)
    cos, sin = fastattn.rotary_tables(64, 16)
    for start in (0, 1, 16, 3, 17, 32):
        yield lambda s=start: fastattn.rotary_embedding(_at(0, 1, 2, 16, 16), cos, sin, offsets=s)
    yield from _attention_calls()


def _attention_calls() -> Iterator[Callable[[], Tensor]]:
    for offset in (0, 8, 1, 0):
        for causal in (False, True):
            yield lambda o=offset, c=causal: fastattn.attention(
                _at(0, 1, 2, 20, 16), _at(o, 1, 2, 20, 16), _at(0, 1, 2, 20, 16), causal=c
            )
    q = _at(0, 1, 4, 20, 16)
    for mask in (_at(0, 20, 20, dtype=torch.bool), _at(0, 1, 20, dtype=torch.bool), None):
        for sinks in (_at(0, 4), None):
            yield lambda m=mask, s=sinks: fastattn.attention(q, q, q, mask=m, sinks=s)


def _other_calls() -> Iterator[Callable[[], Tensor]]:
    """The kernels that those above do not have."""
    x, weight = _at(0, 8, 32), _at(0, 32, 32)
    q, k, starts = _at(0, 40, 2, 16), _at(0, 40, 1, 16), torch.tensor([0, 17, 40], dtype=torch.int32)
    for offset in (0, 1, 0):
        yield lambda o=offset: fastattn.mlp(
            _at(o, 8, 32), weight, None, weight, None, implementation="triton"
        )
        yield lambda o=offset: fastattn.linear_cross_entropy(_at(o, 8, 32), weight, torch.arange(8))
        yield lambda o=offset: fastattn.add_layer_norm(x, _at(o, 8, 32), (32,), weight[0], dropout_p=0.5)[0]
        yield lambda o=offset: fastattn.attention_varlen(q, k, _at(o, 40, 1, 16), starts, starts, 23, 23)
        whole = q.detach().transpose(0, 1)[None]
        yield lambda o=offset, q=whole: fastattn.attention(q, q, q, bias=_at(o, 2, 40, 40), dropout_p=0.2)
        slopes = torch.ones(2)
        yield lambda q=whole, s=slopes: fastattn.attention(
            q, q.clone().requires_grad_(), q, softcap=3.0, alibi_slopes=s
        )


def _formed_calls() -> Iterator[Callable[[], Tensor]]:
    """Rows by descriptors, which are made anew for each launch, and in Gluon."""
    for form in ("descriptors", "warp_groups"):
        config = select_attention_form(64, torch.bfloat16, KNOWN_TARGETS["sm_90"], "plain", form)
        for seq in (200, 200, 130):
            yield lambda s=seq, c=config: _FormFunction.apply(
                *(_at(0, 1, 2, s, 64) for _ in range(3)), True, c
            )


def _repeated() -> Iterator[Callable[[], Any]]:
    """Calls without gradients: those that go past the checks, and caches that grow by a key."""
    for offset in (0, 1, 8, 0):
        for heads_last in (False, True):
            for scale in (None, 0.5):
                yield lambda o=offset, h=heads_last, s=scale: fastattn.attention(
                    *(_heads(o, h) for _ in range(3)), scale=s, causal=True
                )
        x, residual = _at(0, 4, 32), _at(0, 4, 32)
        yield lambda o=offset, x=x: fastattn.layer_norm(x, (32,), _at(o, 32), _at(0, 32))
        yield lambda o=offset, x=x: fastattn.layer_norm(x, (32,), _at(0, 32), _at(o, 32))
        yield lambda o=offset, x=x: fastattn.layer_norm(x, (32,), _at(0, 32))
        yield lambda o=offset: fastattn.rms_norm(_at(o, 4, 32), (32,), eps=0.1)
        yield lambda o=offset, x=x, r=residual: fastattn.add_layer_norm(x, r, (32,), _at(o, 32))
        yield lambda o=offset, x=x: fastattn.add_rms_norm(x, _at(o, 4, 32), (32,), _at(0, 32))
        q = _at(offset, 1, 2, 40, 32)
        yield lambda q=q: fastattn.attention(q, q, q, quantize="e4m3")
    few, cache = _at(0, 1, 4, 1, 16), _at(0, 1, 2, 600, 16)
    for seq in range(500, 530):
        yield lambda s=seq: fastattn.attention(few, cache[:, :, :s], cache[:, :, :s])
        yield lambda s=seq: fastattn.attention(few, *(cache[:, :, :s].contiguous() for _ in range(2)))


def _heads(offset: int, last: bool) -> Tensor:
    return _at(offset, 1, 20, 2, 16).transpose(1, 2) if last else _at(offset, 1, 2, 20, 16)


def main() -> None:
    from triton.runtime import driver

    with without_device():
        driver._active.launcher_cls = _launcher_of
        for launcher in pkgutil.iter_modules(fastattn.kernels.__path__):
            module: Any = import_module(f"fastattn.kernels.{launcher.name}")
            if getattr(module, "launch", None) is _launch.launch and module is not _launch:
                module.launch = _twice(_launch.launch)
        for _ in range(2):
            for call in (*_calls(), *_other_calls(), *_formed_calls()):
                call().float().sum().backward()
            with torch.no_grad():
                for call in _repeated():
                    call()
    print(_counts["compared"], _counts["kept"])


if __name__ == "__main__":
    main()
