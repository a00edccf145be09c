"""How evenly attention's causal programs fill a device: a model of what starts when. `python -m benchmarks.schedule`.

A program takes as long as it visits keys, and a constant for what is not its loop; one starts wherever another ends, as
a GPU does it, or each of a fixed number walks its share, as a persistent kernel does it. Caches are not modelled: what
`heads_together` keeps in L2 is stated beside the times.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fastattn.kernels._attention_config import heads_together, select_attention_config
from fastattn.kernels._target import KNOWN_TARGETS, Target

# A program's time outside its loop, in tiles of keys of it: its own rows loaded, its result stored.
OUTSIDE = 4.0


@dataclass(frozen=True)
class Work:
    """A causal forward: `heads` heads of `seq` queries and keys, in tiles."""

    heads: int
    seq: int
    block_m: int
    block_n: int

    @property
    def tiles(self) -> int:
        return -(-self.seq // self.block_m)

    def time(self, tile: int) -> float:
        """Of a program, the longest of which is tile 0, in tiles of keys."""
        last_row = min(self.seq, (self.tiles - tile) * self.block_m)
        return -(-last_row // self.block_n) + OUTSIDE


def order(tiles: int, heads: int, together: int) -> list[tuple[int, int]]:
    """(tile, head) of each program, as `_split_program` has them."""
    ends = range(heads % together or together, heads + 1, together)
    return [
        (tile, head)
        for end in ends
        for first in [max(0, end - together)]
        for tile in range(tiles)
        for head in range(first, end)
    ]


def sections(work: Work, bytes_of_key: int, target: Target) -> int:
    """How many heads `heads_together` mixes."""
    found = heads_together(work.seq * bytes_of_key, work.heads, True, target)
    return 1 if found is None else found[0]


def makespan(times: Iterable[float], slots: int) -> float:
    """When the last program ends, if each starts in its turn wherever a slot is free first."""
    free = [0.0] * slots
    for time in times:
        heapq.heappush(free, heapq.heappop(free) + time)
    return max(free)


def static_makespan(times: Sequence[float], slots: int) -> float:
    """The same where slot n walks programs n, 2 slots - 1 - n, 2 slots + n, ..., so that long ones meet short ones."""
    shares = [0.0] * slots
    for place, time in enumerate(times):
        turn, slot = divmod(place, slots)
        shares[slots - 1 - slot if turn % 2 else slot] += time
    return max(shares)


def least(times: Sequence[float], slots: int) -> float:
    """No schedule ends before."""
    return max(sum(times) / slots, max(times))


def row(work: Work, together: int, slots: int) -> list[float]:
    """The time over the least of: head after head, sections, all heads together, and the last two by a static share."""
    times = {
        count: [work.time(tile) for tile, _ in order(work.tiles, work.heads, count)]
        for count in {1, together, work.heads}
    }
    bound = least(times[1], slots)
    found = [makespan(times[count], slots) / bound for count in (1, together, work.heads)]
    return [*found, *(static_makespan(times[count], slots) / bound for count in (1, work.heads))]


def main() -> None:
    target = KNOWN_TARGETS["sm_90"]
    tiles = select_attention_config(128, torch.bfloat16, target).forward
    columns = ["programs", "tokens", "heads", "together", "head after head", "sections", "all heads"]
    columns += ["static, head after head", "static, all heads"]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for programs in (1, 2):
        for seq in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            work = Work(16 * max(1, 16384 // seq), seq, tiles.block_m, tiles.block_n)
            together = sections(work, 2 * 128 * 2, target)
            found = row(work, together, programs * target.multiprocessors)
            print(
                "|", programs, "|", seq, "|", work.heads, "|", together, *(f"| {x:.3f}" for x in found), "|"
            )


if __name__ == "__main__":
    main()
