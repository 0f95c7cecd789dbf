"""Constraints on generated texts, and the texts they stop at, compiled on the host to a table over
the tokens in hand.

All constraints together make one automaton over bytes, and a token takes it as many steps as it
has bytes. Tokens that do the same in every state share a column, so that the table stays small.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxformer.batching import power_of_two
from jaxformer.config import DecodeConfig
from jaxformer.data.automata import Automaton, begins_with, includes_any, product
from jaxformer.data.json_schema import to_regex
from jaxformer.data.regular import from_regex
from jaxformer.data.token_bytes import token_bytes
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding.constraints import NEVER, Table
from jaxformer.errors import ConfigError, DataError
from jaxformer.files import read_capped

MAX_ENTRIES = 2**24
"""States times columns of a table: 64 MiB."""
MAX_WORK = 2**28
"""States times tokens that differ, before alike columns are found."""
MAX_FILE = 64 * 2**20
START, BEGUN, END, OWN = 0, 1, 2, 3
"""Rows of a table: nothing is written, nothing but a forced first token, the end, the states."""


Columns = tuple[int, Int[np.ndarray, "S C"], dict[int, int], np.ndarray]
"""Rows, the state after each kind of token, the kind of each token, which rows may end."""


class Constraints(NamedTuple):
    """What the constraints of a `DecodeConfig` ask of a text."""

    include: tuple[str, ...]
    prefix: str
    allowed: tuple[str, ...]
    regex: str


def constraints(options: DecodeConfig) -> Constraints | None:
    """The constraints among `options`, or None if there is none."""
    regex = to_regex(options.json_schema) if options.json_schema else options.regex
    found = Constraints(options.include, options.prefix, options.allowed, regex)
    return found if any(found) else None


def read_files(options: DecodeConfig, default: DecodeConfig) -> DecodeConfig:
    """`options` with the files read that they name by @FILE, unless they are the default's: what
    came with a model names no files of its user's.

    Raises `DataError` if one cannot be read.
    """
    changes = {}
    if options.allowed != default.allowed:
        changes["allowed"] = tuple(
            line
            for text in options.allowed
            for line in (_file(text[1:]).split("\n") if text.startswith("@") else [text])
            if line
        )
        if not changes["allowed"]:
            raise DataError(f"allowed: there is no text in {', '.join(options.allowed)}.")
    if options.json_schema != default.json_schema and options.json_schema.startswith("@"):
        changes["json_schema"] = _file(options.json_schema[1:])
    return dataclasses.replace(options, **changes)


def _file(name: str) -> str:
    try:
        return read_capped(Path(name), MAX_FILE, DataError).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: not UTF-8 ({e.reason} at byte {e.start}).") from None


@lru_cache(16)
def compile_table(
    wanted: Constraints,
    tokenizer: Tokenizer,
    vocabulary: int,
    suppress: tuple[int, ...] = (),
    forced_first: int = -1,
) -> Table:
    """The table of `wanted` for a model of `vocabulary` ids, none of `suppress` among its tokens.

    Raises `ConfigError` if no text of these tokens is accepted, or the table would be too large.
    """
    parts = [includes_any(alternatives(phrase)) for phrase in wanted.include]
    parts += [begins_with(wanted.prefix)] if wanted.prefix else []
    parts += [from_regex(wanted.regex)] if wanted.regex else []
    together = reduce(lambda a, b: product([a, b]), parts) if parts else None
    if wanted.allowed:
        texts = [t for t in wanted.allowed if together is None or together.accepts(t)]
        states, columns, of_token, ends = _trie(tokenizer, texts, forced_first)
    else:
        assert together is not None
        states, columns, of_token, ends = _over_tokens(together, tokenizer)
    if forced_first >= 0:
        # Its column is its own, and but for the first row as it was.
        new = np.full(states, -1)
        if forced_first in of_token:
            new = columns[:, of_token[forced_first]]
        columns = np.column_stack([columns, new])
        columns[START] = -1
        columns[START, -1] = BEGUN
        ends[START] = False
        of_token[forced_first] = columns.shape[1] - 1

    table = _table((states, columns, of_token, ends), tokenizer, vocabulary, suppress)
    if table.need[START] == NEVER:
        raise ConfigError(
            "no text that this tokenizer can write satisfies the constraints (include, prefix, "
            "allowed, regex, json_schema) together; loosen one."
        )
    return table


@lru_cache(16)
def compile_stops(stops: tuple[str, ...], tokenizer: Tokenizer, vocabulary: int) -> Table:
    """The table of texts in which one of `stops` stands, for a model of `vocabulary` ids.

    Raises `ConfigError` if it would be too large.
    """
    return _table(_over_tokens(includes_any(stops), tokenizer), tokenizer, vocabulary)


def _table(
    automaton: Columns, tokenizer: Tokenizer, vocabulary: int, suppress: tuple[int, ...] = ()
) -> Table:
    """The automaton as it is compiled for: of padded size, and with how far each state's end is."""
    states, columns, of_token, ends = automaton
    # Column 0 is of tokens that are never allowed, 1 of those that end a text.
    class_of = np.zeros(vocabulary, np.int32)
    for token, column in of_token.items():
        if token < vocabulary:
            class_of[token] = column + 2
    class_of[list(tokenizer.stop_ids)] = 1
    class_of[[i for i in suppress if i < vocabulary]] = 0
    end = np.where(ends, END, -1)
    following = np.column_stack([np.full(states, -1), end, columns]).astype(np.int32)
    need = tokens_needed(following[:, np.unique(class_of)], ends)
    rows, width = (power_of_two(n, 64) for n in following.shape)
    padding = (0, rows - len(need)), (0, width - following.shape[1])
    return Table(
        np.pad(following, padding, constant_values=-1),
        class_of,
        np.pad(need, padding[0], constant_values=NEVER),
    )


def alternatives(phrase: str) -> list[str]:
    r"""The alternatives of a phrase, between bars; `\|` is a bar itself.

    >>> alternatives(r"colour|color|a\|b")
    ['colour', 'color', 'a|b']
    """
    return [part.replace("\0", "|") for part in phrase.replace(r"\|", "\0").split("|")]


def _over_tokens(automaton: Automaton, tokenizer: Tokenizer) -> Columns:
    """What each token does to an automaton over bytes."""
    following, accepting, free = automaton
    letters, letter = np.unique(following, axis=1, return_inverse=True)
    translation = bytes(letter.reshape(-1).astype(np.uint8).tolist())
    never = {i for i in range(letters.shape[1]) if (letters[:, i] < 0).all()}

    def word(token: bytes | None) -> bytes | None:
        """The kinds of the bytes of a token; None if some byte stands nowhere."""
        kinds = None if token is None else token.translate(translation)
        return None if kinds is None or never.intersection(kinds) else kinds

    # Tokens that are spelt alike, in kinds of bytes, need one walk.
    first, later = token_bytes(tokenizer)
    words = [(word(a), word(b)) for a, b in zip(first, later, strict=True)]
    distinct = sorted({w for pair in words for w in pair if w is not None}, key=len)
    if len(distinct) * len(accepting) > MAX_WORK:
        raise _too_large(len(accepting), len(distinct))
    after: dict[bytes | None, np.ndarray] = {None: np.full(len(accepting), -1, np.int32)}
    shared: dict[bytes, np.ndarray] = {}
    steps = np.vstack([letters, np.full(letters.shape[1], -1)]).T.astype(np.int32)
    for w in distinct:
        state = np.arange(len(accepting), dtype=np.int32)
        for kind in w:
            state = steps[kind][state]  # -1 is the last row, where it stays
        after[w] = shared.setdefault(state.tobytes(), state)
        if len(shared) * len(accepting) > MAX_ENTRIES:
            raise _too_large(len(accepting), len(shared))
    stays = np.where(free, np.arange(len(accepting)), -1)
    kinds: dict[bytes, int] = {}
    columns, of_token = [], {}
    for token, (one, two) in enumerate(words):
        if token in tokenizer.stop_ids:
            continue
        text = first[token] is not None or later[token] is not None
        column = after[two] if text else stays
        begin = int(after[one][0]) if text else BEGUN - OWN if free[0] else -1
        if begin == -1 and column.max(initial=-1) < 0:
            continue
        key = begin.to_bytes(4, "little", signed=True) + column.tobytes()
        if key not in kinds:
            kinds[key] = len(columns)
            begun = begin + OWN if begin != -1 else -1
            moved = np.where(column >= 0, column + OWN, -1)
            columns.append(np.concatenate([[begun, begun, -1], moved]).astype(np.int32))
        of_token[token] = kinds[key]
    states = len(accepting) + OWN
    found = np.array(columns, np.int32).reshape(-1, states).T
    return states, found, of_token, np.concatenate([accepting[[0, 0]], [False], accepting])


def _trie(tokenizer: Tokenizer, texts: Sequence[str], forced_first: int) -> Columns:
    """Exactly the tokens that the model learns for each text (De Cao et al. 2021)."""
    edges: dict[tuple[int, int], int] = {}
    ends = set()
    for text in texts:
        ids = tokenizer.target(text)
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
        ids = ids[1:] if ids[:1] == [forced_first] else ids
        node = BEGUN
        for i in ids:
            node = edges.setdefault((node, i), len(edges) + OWN)
        ends.add(node)
    states, of_token = len(edges) + OWN, {}
    for _, i in edges:
        of_token.setdefault(i, len(of_token))
    if states * len(of_token) > MAX_ENTRIES:
        raise _too_large(states, len(of_token))
    columns = np.full((states, len(of_token)), -1, np.int32)
    for (node, i), child in edges.items():
        columns[node, of_token[i]] = child
    columns[START] = columns[BEGUN]
    may_end = np.isin(np.arange(states), list(ends))
    may_end[START] = may_end[BEGUN]
    return states, columns, of_token, may_end


def tokens_needed(following: Int[np.ndarray, "S C"], ends: np.ndarray) -> Int[np.ndarray, "S"]:
    """How many more tokens a text needs to be accepted, in each state; -1 after its end."""
    need = np.where(ends, 0, NEVER).astype(np.int32)
    need[END] = -1
    pairs = [np.unique(row) for row in following]
    source = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
    target = np.concatenate(pairs)
    on = (target >= 0) & (target != END)
    source, target = source[on], target[on]
    distance, reached = 0, ends
    while reached.any():
        distance += 1
        before = np.zeros_like(ends)
        before[source[reached[target]]] = True
        reached = before & (need == NEVER)
        need[reached] = distance
    return need


def _too_large(states: int, columns: int) -> ConfigError:
    return ConfigError(
        f"the constraints make a table of {states} states by {columns} kinds of tokens or more, "
        f"and {MAX_ENTRIES} entries are the most; allow fewer or shorter texts."
    )
