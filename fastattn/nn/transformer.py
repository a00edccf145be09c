"""The layers of a Transformer in the place of torch.nn's, what stands between attention and linear layers fused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dispatch import NotSupported
from fastattn.nn._fusion import add_and_normalize, dropout_p, is_plain, read_stream
from fastattn.nn.activation import GELU
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm
from fastattn.ops.gelu import gelu
from fastattn.ops.mlp import mlp

# What `mlp` calls the activations that it knows.
_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (gelu, "gelu"), (F.silu, "silu"))
_MODULES = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}
_APPROXIMATIONS = {form: approximate for approximate, form in _GELUS.items()}

_Branch = Callable[[Tensor], Tensor]


class _Layer(torch.nn.Module):
    """What the two layers share: their parts, and the way of a tensor through the branches.

    The parts are torch.nn's, made in its order, so that a seed gives its initial values. `fastattn.nn._fusion` says
    when they are called and when their parameters are computed with.
    """

    _attentions: tuple[str, ...]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        # Not that of torch.nn's layer, which would make the parts, and draw their values, before ours.
        torch.nn.Module.__init__(self)
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        ours = {**made, "implementation": implementation}
        for name in self._attentions:
            attention = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **ours)
            self.add_module(name, attention)
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, **made)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_model, **made)
        branches = range(1, len(self._attentions) + 2)
        for n in branches:
            self.add_module(f"norm{n}", LayerNorm(d_model, layer_norm_eps, **ours))
        for n in branches:
            self.add_module(f"dropout{n}", torch.nn.Dropout(dropout))
        self.norm_first = norm_first
        self.activation = _activation(activation) if isinstance(activation, str) else activation
        self.implementation = implementation

    def extra_repr(self) -> str:
        return "norm_first=True" if self.norm_first else ""

    def _through(self, x: Tensor, *branches: _Branch) -> Tensor:
        """x and the branches, each added to it; a norm before each of them, or behind each sum."""
        numbers = range(1, len(branches) + 1)
        dropouts = [getattr(self, f"dropout{n}") for n in numbers]
        norms = [getattr(self, f"norm{n}") for n in numbers]
        if not self.norm_first:
            for branch, dropout, norm in zip(branches, dropouts, norms, strict=True):
                x, _ = add_and_normalize(branch(x), x, dropout, norm)
            return x
        added: Tensor | None = None
        # The first norm has no branch before it, and so no dropout.
        for branch, dropout, norm in zip(branches, dropouts[:1] + dropouts[:-1], norms, strict=True):
            y, x = read_stream(x, added, dropout, norm)
            added = branch(y)
        last: Tensor = dropouts[-1](added)
        return x + last

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The two linear layers in one operation where nothing stands between the activation and the second."""
        form = _form(self.activation)
        linears_alone = is_plain(self.linear1, torch.nn.Linear) and is_plain(self.linear2, torch.nn.Linear)
        if form is not None and linears_alone and dropout_p(self.dropout) == 0:
            return mlp(
                x,
                self.linear1.weight,
                self.linear1.bias,
                self.linear2.weight,
                self.linear2.bias,
                activation=form,
                implementation=self.implementation,
            )
        hidden = self.linear1(x)
        if form in _APPROXIMATIONS:
            hidden = gelu(hidden, _APPROXIMATIONS[form], implementation=self.implementation)
        else:
            hidden = self.activation(hidden)
        out: Tensor = self.linear2(self.dropout(hidden))
        return out


class TransformerEncoderLayer(_Layer, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` by `fastattn.attention`, `add_layer_norm` and `mlp`.

    With post-norm (norm_first=False), as in Vaswani et al. (2017),

        x = norm1(x + dropout1(self_attn(x)))
        x = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

    and with pre-norm (norm_first=True) each norm stands before its branch instead. A sum, its dropout and the norm
    behind it are one operation; so are the linear layers, where the activation is ReLU, GELU (any form) or SiLU and
    nothing is dropped between them, that is in `eval()` or with dropout=0.

    Parameters, initial values and state dict are torch.nn's, and `torch.nn.TransformerEncoder` takes the layer. Differs
    from torch.nn's in these: `is_causal` works without a mask beside it; dropout draws other elements; gradients of
    nested tensors.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as torch.nn's.
        implementation: "triton", "torch" or "reference" forces one in every operation; None takes the first that can.

    Raises:
        ValueError: d_model is not divisible by nhead, dropout is no probability, or activation is a string other than
            "relu" and "gelu".

    Notes:
        Under autocast attention and linear layers run in its dtype. The stream has the wider dtype of what is added to
        it, as with PyTorch's operators; with pre-norm the norms write what is read of it in autocast's dtype at once.
        Attention with dropout is in linear memory, which on a CPU takes longer than torch.nn's.
        A nested tensor (which `torch.nn.TransformerEncoder` makes of a padding mask in `eval()` and without gradients)
        is computed packed, without its padding; unlike torch.nn's, with gradients too.
        A part that was replaced, has a hook or is parametrized is called as it is, and then not fused with others.
    """

    _attentions = ("self_attn",)

    _nests = True

    @property
    def activation_relu_or_gelu(self) -> int:
        """1 for ReLU, 2 for GELU, else 0: `torch.nn.TransformerEncoder` asks before it makes nested tensors.

        Set to 0, it keeps the encoder from making them.
        """
        if not self._nests:
            return 0
        if self.activation is F.relu or isinstance(self.activation, torch.nn.ReLU):
            return 1
        return 2 if self.activation is F.gelu or isinstance(self.activation, torch.nn.GELU) else 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self._nests = bool(value)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output.

        Args:
            src: (seq, batch, d_model), or (batch, seq, d_model) with batch_first, or unbatched (seq, d_model); or a
                nested tensor of (batch, seq, d_model).
            src_mask: (seq, seq) or (batch * nhead, seq, seq): True hides, floats are added.
            src_key_padding_mask: (batch, seq), or (seq,) unbatched: True hides a position; floats are added.
            is_causal: a position sees itself and those before it; a src_mask beside it is taken to be the causal mask
                and is not read.

        Returns:
            A tensor of src's shape, nested if src is.

        Raises:
            ValueError: a shape does not fit, or a mask is given with a nested tensor.
            NotSupported: the implementation asked for cannot take the call, or src is nested and self_attn not ours.
        """
        if src.is_nested:
            for name, mask in (("src_mask", src_mask), ("src_key_padding_mask", src_key_padding_mask)):
                if mask is not None:
                    raise ValueError(f"{name} goes with no nested tensor, whose lengths say what is there")
            return self._nested(src, is_causal)

        def attend_to_itself(x: Tensor) -> Tensor:
            masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
            return self.self_attn(x, x, x, need_weights=False, is_causal=is_causal, **masks)[0]

        return self._through(src, attend_to_itself, self._feed_forward)

    def _nested(self, src: Tensor, is_causal: bool) -> Tensor:
        """All sequences of a nested tensor one behind the other: only attention has to know where each begins."""
        if not isinstance(self.self_attn, MultiheadAttention):
            raise NotSupported(
                f"a nested src is for fastattn.nn.MultiheadAttention, and self_attn is {type(self.self_attn)}; "
                "torch.nn.TransformerEncoder makes none with enable_nested_tensor=False"
            )
        if src.layout == torch.jagged and src.lengths() is None:  # type: ignore[attr-defined]
            return self._jagged(src, is_causal)
        rows = src.unbind()
        if not rows:
            return src
        lengths = [row.size(0) for row in rows]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=src.device)
        out = self._packed(torch.cat(rows), starts, max(lengths), is_causal)
        return torch.nested.as_nested_tensor(list(out.split(lengths)), layout=src.layout)

    def _jagged(self, src: Tensor, is_causal: bool) -> Tensor:
        """As `_nested`, of a tensor that is packed already; the result shares its offsets: they can be added."""
        starts: Tensor = src.offsets()  # type: ignore[attr-defined]
        if starts.numel() == 1:
            return src
        longest = int(starts.diff().max())
        out = self._packed(src.values(), starts.int(), longest, is_causal)
        return torch.nested.nested_tensor_from_jagged(out, starts)

    def _packed(self, x: Tensor, starts: Tensor, longest: int, is_causal: bool) -> Tensor:
        packing = {"cu_seqlens": starts, "max_seqlen": longest}

        def attend_to_itself(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, need_weights=False, is_causal=is_causal, **packing)[0]

        return self._through(x, attend_to_itself, self._feed_forward)


class TransformerDecoderLayer(_Layer, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` by `fastattn.attention`, `add_layer_norm` and `mlp`.

    With post-norm (norm_first=False), as in Vaswani et al. (2017),

        x = norm1(x + dropout1(self_attn(x)))
        x = norm2(x + dropout2(multihead_attn(x, memory)))
        x = norm3(x + dropout3(linear2(dropout(activation(linear1(x))))))

    Everything else, arguments, errors and notes, is as in `TransformerEncoderLayer`, but for nested tensors, which are
    not taken.
    """

    _attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output.

        Args:
            tgt: as `src` of `TransformerEncoderLayer`, not nested.
            memory: (seq_memory, batch, d_model), laid out like tgt; the encoder's output.
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: of the self-attention, as there.
            memory_mask: (seq, seq_memory) or (batch * nhead, seq, seq_memory).
            memory_key_padding_mask: (batch, seq_memory), or (seq_memory,) unbatched.
            memory_is_causal: position i of tgt sees those j <= i of memory.

        Returns:
            A tensor of tgt's shape.

        Raises:
            ValueError: a shape does not fit.
            NotSupported: a tensor is nested, or the implementation asked for cannot take the call.
        """
        if tgt.is_nested or memory.is_nested:
            raise NotSupported("a nested tgt or memory is not supported; pad them, and mask the padding")

        def attend_to_itself(x: Tensor) -> Tensor:
            masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
            return self.self_attn(x, x, x, need_weights=False, is_causal=tgt_is_causal, **masks)[0]

        def attend_to_memory(x: Tensor) -> Tensor:
            masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
            return self.multihead_attn(
                x, memory, memory, need_weights=False, is_causal=memory_is_causal, **masks
            )[0]

        return self._through(tgt, attend_to_itself, attend_to_memory, self._feed_forward)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ("relu", "gelu"):
        raise ValueError(f"activation={name!r} must be 'relu', 'gelu' or a function")
    return F.relu if name == "relu" else F.gelu


def _form(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which `mlp` knows an activation, None where it does not."""
    if not isinstance(activation, torch.nn.Module):
        return next((form for function, form in _FUNCTIONS if activation is function), None)
    if is_plain(activation, torch.nn.GELU) or (
        is_plain(activation, GELU) and activation.implementation is None
    ):
        return _GELUS.get(activation.approximate)
    kind = type(activation)
    return _MODULES[kind] if kind in _MODULES and is_plain(activation, kind) else None
