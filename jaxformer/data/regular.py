"""A regular expression as an automaton: what it accepts is what `re.fullmatch` matches.

Python's own parser reads it, and Python says which characters a class has.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxformer.data.automata import Automaton, explore, minimal, utf8
from jaxformer.errors import ConfigError

# The one parser that agrees with re.fullmatch in everything is its own.
parser: Any = re._parser  # pyright: ignore
compiler: Any = re._compiler  # pyright: ignore
combine: Any = compiler._combine_flags
MAX_NODES = 2**15


class Graph:
    """A nondeterministic automaton (Thompson 1968): some arrows read nothing, others bytes."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.silent: list[list[int]] = []
        self.reading: list[list[tuple[int, int, int]]] = []
        """(lowest byte, highest, node)."""

    def node(self) -> int:
        if len(self.silent) == MAX_NODES:
            raise ConfigError(
                f"regex {self.pattern[:80]!r}: it is over {MAX_NODES} steps long when its "
                "repetitions are written out; make them fewer, or its classes smaller: (?a) makes "
                r"\w, \d and \s those of ASCII."
            )
        self.silent.append([])
        self.reading.append([])
        return len(self.silent) - 1

    def sequence(self, items: Iterable[tuple[Any, Any]], flags: int, at: int) -> int:
        """Add a sequence from node `at` on; the node where it ends."""
        for item in items:
            at = self.item(item, flags, at)
        return at

    def item(self, item: tuple[Any, Any], flags: int, at: int) -> int:
        """Add one item of Python's parse from node `at` on; the node where it ends."""
        match str(item[0]), item[1]:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN", _:
                end = self.node()
                for low, high in characters(item, flags):
                    for sequence in utf8(low, high):
                        self.bytes(sequence, at, end)
                return end
            case "BRANCH", (_, branches):
                end = self.node()
                for branch in branches:
                    self.silent[self.sequence(branch, flags, at)].append(end)
                return end
            case "SUBPATTERN", (_, added, removed, inner):
                return self.sequence(inner, combine(flags, added, removed), at)
            case "MAX_REPEAT" | "MIN_REPEAT", (least, most, inner):
                size = len(self.silent)
                for _ in range(least):
                    at = self.sequence(inner, flags, at)
                    if len(self.silent) == size:  # it reads nothing, however often
                        return at
                if most is parser.MAXREPEAT:
                    begin, end = self.node(), self.node()
                    self.silent[at].append(begin)
                    self.silent[self.sequence(inner, flags, begin)].append(begin)
                    self.silent[begin].append(end)
                    return end
                end = self.node()
                for _ in range(most - least):
                    self.silent[at].append(end)
                    size = len(self.silent)
                    at = self.sequence(inner, flags, at)
                    if len(self.silent) == size:
                        break
                self.silent[at].append(end)
                return end
        raise ConfigError(
            f"regex {self.pattern[:80]!r}: a {str(item[0]).lower().replace('_', ' ')} is no part "
            "of a regular language; write it without (look-around, back-references, anchors "
            "inside, atomic groups and possessive repetitions are refused)."
        )

    def bytes(self, sequence: Sequence[tuple[int, int]], at: int, end: int) -> None:
        for low, high in sequence[:-1]:
            self.reading[at].append((low, high, new := self.node()))
            at = new
        self.reading[at].append((*sequence[-1], end))

    def closure(self, nodes: Iterable[int]) -> frozenset[int]:
        """The nodes that can be reached without reading."""
        found, left = set(), list(nodes)
        while left:
            if (node := left.pop()) not in found:
                found.add(node)
                left += self.silent[node]
        # Nodes that only pass on tell no states apart.
        return frozenset(n for n in found if self.reading[n] or n == 1)


@lru_cache(64)
def from_regex(pattern: str) -> Automaton:
    """The automaton of a pattern in the syntax of Python's `re`; it must match the whole text.

    Raises `ConfigError` if the pattern is malformed, too large, or no regular language.
    """
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ConfigError(f"regex {pattern[:80]!r}: {e}.") from None
    items = list(tree)
    # The whole text must match anyhow.
    while items and str(items[0][0]) == "AT" and "BEGINNING" in str(items[0][1]):
        del items[0]
    while items and str(items[-1][0]) == "AT" and "AT_END" in str(items[-1][1]):
        del items[-1]
    graph = Graph(pattern)
    start, end = graph.node(), graph.node()
    try:
        graph.silent[graph.sequence(items, tree.state.flags, start)].append(end)
    except RecursionError:
        raise ConfigError(f"regex {pattern[:80]!r}: it is nested too deeply.") from None

    def rows(nodes: frozenset[int]) -> list[frozenset[int] | None]:
        arrows = [arrow for node in nodes for arrow in graph.reading[node]]
        cuts = sorted({0, 256, *(a[0] for a in arrows), *(a[1] + 1 for a in arrows)})
        row: list[frozenset[int] | None] = []
        for low, high in zip(cuts, cuts[1:], strict=False):
            after = graph.closure(n for first, last, n in arrows if first <= low <= last)
            row += [after or None] * (high - low)
        return row

    first = graph.closure([start])
    following, order = explore(first, rows, f"regex {pattern[:80]!r}")  # pyright: ignore
    accepting = np.array([end in nodes for nodes in order])  # pyright: ignore
    return minimal(Automaton(following, accepting, np.zeros(len(order), bool)))


def characters(item: tuple[Any, Any], flags: int) -> list[tuple[int, int]]:
    """The ranges of characters that an item which reads one character matches."""
    if str(item[0]) == "LITERAL" and not flags & re.IGNORECASE:
        return [(item[1], item[1])]
    return _characters(repr(item), flags & (re.IGNORECASE | re.DOTALL | re.ASCII), item)


_known: dict[tuple[str, int], list[tuple[int, int]]] = {}


def _characters(key: str, flags: int, item: tuple[Any, Any]) -> list[tuple[int, int]]:
    if (key, flags) not in _known:
        state = parser.State()
        state.str, state.flags = "", flags if flags & re.ASCII else flags | re.UNICODE
        one = compiler.compile(parser.SubPattern(state, [item]), state.flags)
        found = np.array([ord(c) for c in one.findall(_every_character())], np.int64)
        breaks = np.flatnonzero(np.diff(found, prepend=-2) != 1)
        ends = np.append(breaks[1:], len(found)) - 1
        if len(_known) >= 1000:
            _known.clear()
        _known[key, flags] = [*zip(found[breaks].tolist(), found[ends].tolist(), strict=True)]
    return _known[key, flags]


@lru_cache(1)
def _every_character() -> str:
    return "".join(map(chr, range(0x110000)))
