"""Finite automata over the bytes of UTF-8: of a regular expression, a prefix, phrases to include.

Bytes, because tokens are made of them, and may end within a character.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxformer.errors import ConfigError

MAX_STATES = 2**13


class Automaton(NamedTuple):
    """Which texts are accepted; reading begins in state 0."""

    following: Int[np.ndarray, "S 256"]
    """The state after each byte, -1 if none is."""
    accepting: Bool[np.ndarray, " S"]
    free: Bool[np.ndarray, " S"]
    """Whether a token may stand here that is no text: it changes nothing."""

    def accepts(self, text: str) -> bool:
        """Whether `text` is accepted."""
        state = 0
        for byte in text.encode(errors="replace"):
            if state >= 0:
                state = int(self.following[state, byte])
        return state >= 0 and bool(self.accepting[state])


def begins_with(text: str) -> Automaton:
    """Texts that begin with `text`."""
    data = text.encode(errors="replace")
    _bounded(len(data), "the prefix")
    following = np.full((len(data) + 1, 256), -1, np.int32)
    following[np.arange(len(data)), list(data)] = np.arange(1, len(data) + 1)
    following[-1] = len(data)
    done = np.arange(len(data) + 1) == len(data)
    return Automaton(following, done, done)


def includes_any(phrases: Sequence[str]) -> Automaton:
    """Texts in which at least one of `phrases` stands (Aho and Corasick 1975)."""
    wanted = [phrase.encode(errors="replace") for phrase in phrases]
    _bounded(sum(map(len, wanted)), "a phrase to include")
    # A state is the longest end of the text that may grow into a phrase; the last, that one is in.
    begun = sorted({phrase[:n] for phrase in wanted for n in range(len(phrase))}, key=len)
    number = {part: i for i, part in enumerate(begun)}
    following = np.zeros((len(begun) + 1, 256), np.int32)
    following[-1] = len(begun)
    for part in begun:
        for byte in {byte for phrase in wanted for byte in phrase}:
            end = part + bytes([byte])
            if any(end.endswith(phrase) for phrase in wanted):
                following[number[part], byte] = len(begun)
                continue
            while end not in number:
                end = end[1:]
            following[number[part], byte] = number[end]
    return Automaton(
        following, np.arange(len(following)) == len(begun), np.ones(len(following), bool)
    )


def explore(
    start: object, rows: Callable[[object], Sequence[object]], what: str
) -> tuple[Int[np.ndarray, "S 256"], list[object]]:
    """Number the states that can be reached from `start`, given the 256 after each, or None."""
    order, number, following = [start], {start: 0}, []
    for state in order:
        row = rows(state)
        for after in set(row) - number.keys() - {None}:
            _bounded(len(order), what)
            number[after] = len(order)
            order.append(after)
        following.append([number.get(after, -1) for after in row])
    return np.array(following, np.int32), order


def product(automata: Sequence[Automaton]) -> Automaton:
    """Texts that all of `automata` accept."""

    def rows(states: tuple[int, ...]) -> list[tuple[int, ...] | None]:
        after = [a.following[s].tolist() for a, s in zip(automata, states, strict=True)]
        return [None if min(both) < 0 else both for both in zip(*after, strict=True)]

    start = (0,) * len(automata)
    following, order = explore(start, rows, "what the constraints ask for together")  # pyright: ignore
    states = np.array(order).T
    return minimal(
        Automaton(
            following,
            np.all([a.accepting[s] for a, s in zip(automata, states, strict=True)], 0),
            np.all([a.free[s] for a, s in zip(automata, states, strict=True)], 0),
        )
    )


def minimal(automaton: Automaton) -> Automaton:
    """The fewest states that accept the same texts (Moore 1956)."""
    following, accepting, free = automaton
    letters, _ = np.unique(following, axis=1, return_inverse=True)  # alike bytes count once
    part, count = accepting * 2 + free, 0
    while True:
        after = np.where(letters >= 0, part[letters], -1)
        _, part = np.unique(np.column_stack([part, after]), axis=0, return_inverse=True)
        part = part.reshape(-1)
        if part.max() + 1 == count:
            break
        count = part.max() + 1
    part = np.where(part == part[0], 0, np.where(part == 0, part[0], part))  # the first stays first
    _, first = np.unique(part, return_index=True)
    found = following[first]
    return Automaton(np.where(found >= 0, part[found], -1), accepting[first], free[first])


def _bounded(states: int, what: str) -> None:
    if states >= MAX_STATES:
        raise ConfigError(
            f"{what}: over {MAX_STATES} states are needed; make it shorter, its repetitions fewer, "
            r"or its classes smaller: in a regex, (?a) makes \w, \d and \s those of ASCII."
        )


def utf8(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    """The characters from `low` to `high` as sequences of ranges of bytes.

    >>> [*utf8(0x7E, 0x81)]
    [[(126, 127)], [(194, 194), (128, 129)]]
    """
    # Cut where the number of bytes changes, and around surrogates, which UTF-8 has none of.
    for begin, end in pairwise((0, 0x80, 0x800, 0xD800, 0xE000, 0x10000, 0x110000)):
        if begin != 0xD800 and max(low, begin) <= min(high, end - 1):
            yield from _ranges(max(low, begin), min(high, end - 1))


def _ranges(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    first, last = chr(low).encode(), chr(high).encode()
    for n in range(len(first) - 1, 0, -1):  # the last n bytes, six bits each
        below = (1 << 6 * n) - 1
        if low >> 6 * n != high >> 6 * n:
            if low & below:
                yield from _ranges(low, low | below)
                yield from _ranges((low | below) + 1, high)
                return
            if high & below != below:
                yield from _ranges(low, (high & ~below) - 1)
                yield from _ranges(high & ~below, high)
                return
    yield list(zip(first, last, strict=True))
