"""What can be measured: a frozen shape of an operation, its inputs, and the formula that results are held against.

A case knows its name (for tables and test ids) and makes its own inputs, so that every provider gets the same
values in the same layout. benchmarks/suites.py says which cases are measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.models.blocks import Block
from fastattn.models.config import BlockConfig
from fastattn.testing import make_tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Results are compared on this many rows: enough to see an error, little enough to move to the host.
_CHECKED_ROWS = 256


class Case(Protocol):
    """What `benchmarks.measure` needs of a case."""

    operation: ClassVar[str]

    @property
    def name(self) -> str: ...

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """The tensors that every provider is called with, with gradients required where there are any."""

    def reference(self, *tensors: Tensor) -> Tensor:
        """The operation by its formula, in the dtype of the tensors."""

    def part(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is compared of (output, *gradients): little, and telling."""

    def samples(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Of (output's gradient, *inputs), pieces from which that part can be computed, one piece at a time."""


def shape_of(case: Any) -> dict[str, Any]:
    """A case's fields, for a row: numbers and strings."""
    return {name: DTYPE_NAMES.get(value, value) for name, value in asdict(case).items()}


def draw(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
    seed: int = 0,
) -> Tensor:
    """Standard normal values, the same for a seed on every call.

    On a GPU they are drawn there and so are others than on a CPU: the largest inputs take seconds on the host.
    """
    if torch.device(device).type != "cuda":
        return make_tensor(*shape, dtype=dtype, device=device, requires_grad=requires_grad, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    return values.requires_grad_(requires_grad)


def _spread_rows(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows at equal distances, the first and the last among them; all of what has one dimension."""
    return tuple(_rows_of(t) if t.dim() > 1 else t for t in results)


def _rows_of(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(0, -2)
    count = min(_CHECKED_ROWS, len(rows))
    chosen = [index * (len(rows) - 1) // max(1, count - 1) for index in range(count)]
    return rows[torch.tensor(chosen, dtype=torch.long, device=rows.device)]


def _everything(given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [given]


@dataclass(frozen=True)
class AttentionCase:
    """softmax(q k^T) v with q (batch, heads, seq_q, head_dim) and k, v (batch, kv_heads, seq_k, head_dim)."""

    batch: int
    heads: int
    seq_q: int
    head_dim: int
    kv_heads: int | None = None
    seq_k: int | None = None
    causal: str | bool = False
    dtype: torch.dtype = torch.float32
    # What else modifies the scores, by the names of benchmarks/inspection/rows.py: the inspector's cases alone have it.
    score: str = ""

    operation: ClassVar[str] = "attention"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(batch, heads, kv_heads, seq_q, seq_k, head_dim), with the defaults filled in."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        seq_k = self.seq_q if self.seq_k is None else self.seq_k
        return self.batch, self.heads, kv_heads, self.seq_q, seq_k, self.head_dim

    @property
    def name(self) -> str:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        mask = str(self.causal).replace("_", "-") if self.causal else "full"
        groups = f"h{heads}" if heads == kv_heads else f"h{heads}kv{kv_heads}"
        lengths = f"s{seq_q}" if seq_q == seq_k else f"q{seq_q}k{seq_k}"
        score = f"-{self.score}" if self.score else ""
        return f"{DTYPE_NAMES[self.dtype]}-{mask}-b{batch}{groups}-{lengths}-d{head_dim}{score}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        sizes = ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))
        return tuple(
            draw(batch, h, s, head_dim, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, (h, s) in enumerate(sizes)
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        out = reference.attention(*tensors, causal=self.causal)
        return out if isinstance(out, Tensor) else out[0]

    def part(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first key head with its queries, of the first sequence, and the last one of the last."""
        return tuple(torch.cat(pair) for pair in zip(*self.samples(results), strict=True))

    def samples(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Heads are independent of each other, so each of the two is computed from its own part."""
        _, heads, kv_heads, *_ = self.shape
        counts = (heads // kv_heads,) * 2 + (1, 1)
        pairs = list(zip(given, counts, strict=False))
        return [tuple(t[:1, :count] for t, count in pairs), tuple(t[-1:, -count:] for t, count in pairs)]


@dataclass(frozen=True)
class LayerNormCase:
    """LayerNorm over the last dimension of x (rows, width)."""

    rows: int
    width: int
    affine: bool = True
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "layer_norm"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}" + ("" if self.affine else "-plain")

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        shapes = ((self.rows, self.width), (self.width,), (self.width,))[: 3 if self.affine else 1]
        return tuple(
            draw(*shape, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, shape in enumerate(shapes)
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        weight, bias = tensors[1:] or (None, None)
        return reference.layer_norm(tensors[0], self.width, weight, bias)

    part = staticmethod(_spread_rows)
    samples = staticmethod(_everything)


@dataclass(frozen=True)
class GeluCase:
    """GELU of x (rows, width)."""

    rows: int
    width: int
    approximate: str = "none"
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "gelu"

    @property
    def name(self) -> str:
        form = "erf" if self.approximate == "none" else self.approximate
        return f"{DTYPE_NAMES[self.dtype]}-{form}-{self.rows}x{self.width}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, self.width, dtype=self.dtype, device=device, requires_grad=True),)

    def reference(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return reference.gelu(x, self.approximate)

    part = staticmethod(_spread_rows)
    samples = staticmethod(_everything)


@dataclass(frozen=True)
class MlpCase:
    """gelu(x W1^T + b1) W2^T + b2 of x (rows, width), with W1 (hidden, width)."""

    rows: int
    width: int
    hidden: int
    approximate: str = "tanh"
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        form = "erf" if self.approximate == "none" else self.approximate
        return f"{DTYPE_NAMES[self.dtype]}-{form}-{self.rows}x{self.width}x{self.hidden}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        width, hidden = self.width, self.hidden
        x, *parameters = (
            draw(*shape, dtype=self.dtype, device=device, seed=seed)
            for seed, shape in enumerate(
                ((self.rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
            )
        )
        # As after initialization: products keep the size of what they are made from.
        scales = (width**-0.5, 1.0, hidden**-0.5, 1.0)
        scaled = (p * scale for p, scale in zip(parameters, scales, strict=True))
        return tuple(t.requires_grad_() for t in (x, *scaled))

    def reference(self, *tensors: Tensor) -> Tensor:
        x, w1, b1, w2, b2 = tensors
        return F.linear(reference.gelu(F.linear(x, w1, b1), self.approximate), w2, b2)

    part = staticmethod(_spread_rows)
    samples = staticmethod(_everything)


@dataclass(frozen=True)
class LossCase:
    """Mean cross-entropy of logits (rows, vocabulary); a tenth of the targets is ignored."""

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "loss"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.vocabulary}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, self.vocabulary, dtype=self.dtype, device=device, requires_grad=True),)

    def targets(self, device: torch.device | str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        targets[::10] = -100
        return targets.to(device)

    def reference(self, *tensors: Tensor) -> Tensor:
        """In float32 or wider, as PyTorch's own; the mean of lse - logit of the target."""
        (logits,) = tensors
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = self.targets(logits.device)
        kept = targets != -100
        chosen = wide.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return ((torch.logsumexp(wide, 1) - chosen) * kept).sum().div(kept.sum()).to(logits.dtype)

    part = staticmethod(_spread_rows)
    samples = staticmethod(_everything)


@dataclass(frozen=True)
class BlockCase:
    """One pre-norm Transformer block, causal, on (batch, seq_len, width); its parameters are inputs."""

    batch: int
    seq_len: int
    width: int
    heads: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "block"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-b{self.batch}-s{self.seq_len}-w{self.width}-h{self.heads}"

    def block(self, implementation: str, device: torch.device | str) -> Block:
        """The same weights for every implementation."""
        torch.manual_seed(0)
        config = BlockConfig(d_model=self.width, n_heads=self.heads, implementation=implementation)
        return Block(config, causal=True).to(device, self.dtype)

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        x = draw(self.batch, self.seq_len, self.width, dtype=self.dtype, device=device, requires_grad=True)
        return (x, *self.block("naive", device).parameters())

    def reference(self, *tensors: Tensor) -> Tensor:
        return call_block(self.block("naive", "meta"), *tensors)

    part = staticmethod(_spread_rows)
    samples = staticmethod(_everything)


def call_block(block: Block, x: Tensor, *parameters: Tensor) -> Tensor:
    """The block with these parameters in the place of its own."""
    names = (name for name, _ in block.named_parameters())
    out: Tensor = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
    return out


@dataclass(frozen=True)
class GptCase:
    """One training step of a GPT on (batch, seq_len) tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    seq_len: int

    operation: ClassVar[str] = "gpt"

    @property
    def name(self) -> str:
        return f"L{self.layers}-w{self.width}-h{self.heads}-v{self.vocabulary}-b{self.batch}-s{self.seq_len}"


OpCase = AttentionCase | LayerNormCase | GeluCase | MlpCase | LossCase | BlockCase
