"""Numbers that count what is done with them: how the tests of costs count FLOPs."""

from __future__ import annotations


class Count:
    """A number that counts the operations made on it and on its results."""

    made = 0

    def _made(self, other: object = None) -> Count:
        Count.made += 1
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _made


def unary(x: Count) -> Count:
    """A root, exponential, erf or tanh."""
    return x._made()


def counted(function) -> int:
    Count.made = 0
    function()
    return Count.made


def mean(values: list[Count]) -> Count:
    total = Count()
    for value in values:
        total = total + value
    return total / len(values)
