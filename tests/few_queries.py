"""What tests of attention of few queries share: their grids and their inputs."""

from __future__ import annotations

from torch import Tensor

from fastattn.kernels._attention_grid import FewQueriesGrid, few_queries_grid, may_fold
from fastattn.kernels._attention_plan import reach_of
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, Target
from fastattn.testing import make_tensor


def grid_for(
    q: Tensor, v: Tensor, asked: AttentionOptions, target: Target = INTERPRETER
) -> FewQueriesGrid | None:
    width, reach = max(q.size(3), v.size(3)), reach_of(asked, q, v)
    return few_queries_grid(q.size(1), v.size(1), reach, width, q.dtype, target, may_fold(asked))


def grid_of(
    q: Tensor, v: Tensor, asked: AttentionOptions, target: Target = INTERPRETER
) -> tuple[bool, int] | None:
    """(folded, splits), or None for the plain grid."""
    few = grid_for(q, v, asked, target)
    return None if few is None else (few.folded, few.splits)


def decode_inputs(seq_q: int, groups: int, batch: int = 2, head_dim: int = 16) -> list[Tensor]:
    """q, k, v with two key heads and 133 keys."""
    shapes = ((2 * groups, seq_q), (2, 133), (2, 133))
    return [make_tensor(batch, *shape, head_dim, seed=n) for n, shape in enumerate(shapes)]
