"""What a case of attention may ask for beyond a causal mask: each option by a name, and several of them joined by "+".

The same options are timed (the suite "options"), checked against the formula, and compiled for GPUs that are not
there (`python -m benchmarks inspect --shape options=...`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.base import draw

Shape = tuple[int, int, int, int, int, int]  # (batch, heads, kv_heads, seq_q, seq_k, head_dim)
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Option:
    """Keywords of `fastattn.attention` for a shape, and a parameter that is learned, if there is one.

    Attributes:
        keywords: from (shape, dtype, device).
        learned: the name of a further keyword whose tensor gets a gradient, and its shape from (shape).
    """

    keywords: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]] = lambda shape, dtype, device: {}
    learned: tuple[str, Callable[[Shape], tuple[int, ...]]] | None = None


def _window(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"window": (max(1, shape[4] // 4), 0)}


def _alibi(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Press et al. (2022): slopes 2^(-8 / heads), 2^(-16 / heads), ..."""
    heads = shape[1]
    return {"alibi_slopes": torch.exp2(torch.arange(1, heads + 1, device=device) * (-8.0 / heads))}


def _mask(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Padding at the end of each sequence but the first, (batch, 1, 1, seq_k)."""
    keys = torch.arange(shape[4], device=device)
    return {"mask": keys < _lengths(shape, dtype, device)["key_lengths"][:, None, None, None]}


def _lengths(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, seq_k = shape[0], shape[4]
    lengths = torch.arange(batch, 0, -1, device=device) * seq_k // batch
    return {"key_lengths": lengths.int()}


# T5's bias, one for all of the batch; a boolean mask of padding; what GPT-OSS, Gemma 2, MPT and Mistral ask for.
OPTIONS = {
    "window": Option(_window),
    "softcap": Option(lambda shape, dtype, device: {"softcap": 30.0}),
    "alibi": Option(_alibi),
    "lse": Option(lambda shape, dtype, device: {"return_lse": True}),
    "bias": Option(learned=("bias", lambda shape: (1, shape[1], shape[3], shape[4]))),
    "mask": Option(_mask),
    "lengths": Option(_lengths),
    "sinks": Option(learned=("sinks", lambda shape: (shape[1],))),
    "dropout": Option(lambda shape, dtype, device: {"dropout_p": DROPOUT_P}),
}


def split_options(options: str) -> tuple[str, ...]:
    """The names in "bias+dropout", in that order.

    Raises:
        ValueError: there is no such option, or one is named twice.
    """
    names = tuple(options.split("+")) if options else ()
    for name in names:
        if name not in OPTIONS or names.count(name) > 1:
            raise ValueError(
                f"options={options!r} must be names joined by '+'; there are {', '.join(OPTIONS)}"
            )
    return names


def fixed_keywords(
    names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The keywords of all these options but those of learned parameters."""
    return {
        key: value for name in names for key, value in OPTIONS[name].keywords(shape, dtype, device).items()
    }


def learned_parameters(
    names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The learned parameters of these options by their keywords, with gradients required."""
    found = {}
    for seed, name in enumerate(names, start=3):
        learned = OPTIONS[name].learned
        if learned is not None:
            key, sizes = learned
            found[key] = draw(*sizes(shape), dtype=dtype, device=device, requires_grad=True, seed=seed)
    return found
