"""Automata accept what Python's `re.fullmatch` does, and nothing else."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data import automata
from jaxformer.data.automata import begins_with, includes_any, minimal, product, utf8
from jaxformer.data.regular import from_regex
from jaxformer.errors import ConfigError

ATOMS = ["a", "b", "é", "日", ".", "[ab]", "[^a]", r"\d", r"\w", "[a-é]", "(?i:ab)", "()"]
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}", "{,3}"])).map(
            "(?:{0[0]}){0[1]}".format
        ),
    ),
    max_leaves=6,
)
texts = st.text("abABé日1\n😀", max_size=5)


@given(patterns, st.lists(texts, min_size=5, max_size=20))
@settings(max_examples=150, deadline=None)
def test_an_automaton_accepts_what_fullmatch_does(pattern, words):
    automaton = from_regex(pattern)
    for text in words:
        assert automaton.accepts(text) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize(
    ("pattern", "accepted", "refused"),
    [
        ("a|ab", ["a", "ab"], ["", "b"]),  # the first alternative does not win
        ("a*?b?", ["", "aa", "aab"], ["bb"]),
        (r"^ab\Z", ["ab"], ["ab\n"]),
        ("(?i)ß|k", ["ẞ", "K", "\u212a"], ["ss"]),
        ("(?s).", ["\n", "😀"], ["ab"]),
        ("(?a:\\d)", ["1"], ["٣"]),
        ("(?a)(?u:\\w)", ["a", "é"], ["ab"]),
        ("(a*)*b", ["b", "aab"], ["a"]),
        ("[\ud7ff-\ue000]", ["\ud7ff", "\ue000"], ["\ue001"]),
    ],
)
def test_corners(pattern, accepted, refused):
    for text in [*accepted, *refused]:
        assert from_regex(pattern).accepts(text) == (text in accepted)
        assert bool(re.fullmatch(pattern, text)) == (text in accepted)


def test_what_reads_nothing_may_be_repeated_for_ever():
    found = from_regex("((){60000}){60000}a(?:()){0,4000000000}b?")  # Python would take years
    assert [text for text in ("", "a", "ab", "b") if found.accepts(text)] == ["a", "ab"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unterminated"),
        ("a(?=b)", "no part of a regular language"),
        (r"(a)\1", "no part of a regular language"),
        ("a++", "no part of a regular language"),
        ("a$b", "no part of a regular language"),
        ("(?:a{1000}){1000}", "repetitions"),
        ("(a|b)*a(a|b){30}", "over 8192 states"),
        ("(" * 5000 + ")" * 5000, "recursion"),
    ],
)
def test_what_is_no_regular_language_or_too_large_is_refused(pattern, message):
    with pytest.raises(ConfigError, match=message):
        from_regex(pattern)


@given(st.integers(0, 0x10FFFF), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_ranges_of_bytes_are_the_characters(low, more):
    high = min(low + more, 0x10FFFF)
    inside = [c for c in range(low, high + 1) if not 0xD800 <= c < 0xE000]
    count = 0
    for sequence in utf8(low, high):
        size = 1
        for first, last in sequence:
            size *= last - first + 1
        count += size
        for end in (0, 1):
            character = ord(bytes(byte[end] for byte in sequence).decode())
            assert low <= character <= high
    assert count == len(inside)


phrases = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3)


@given(phrases, phrases, st.text("ab", max_size=3), st.lists(st.text("abc", max_size=8)))
@settings(max_examples=80, deadline=None)
def test_phrases_and_prefixes_together(one, two, prefix, words):
    together = product([includes_any(one), includes_any(two), begins_with(prefix)])
    for text in words:
        wanted = any(p in text for p in one) and any(p in text for p in two)
        assert together.accepts(text) == (wanted and text.startswith(prefix))


@given(patterns, patterns, st.lists(texts))
@settings(max_examples=50, deadline=None)
def test_a_product_is_both(one, two, words):
    together = product([from_regex(one), from_regex(two)])
    for text in words:
        both = re.fullmatch(one, text) and re.fullmatch(two, text)
        assert together.accepts(text) == bool(both)


def test_the_fewest_states():
    assert len(from_regex("aaab|baab|cc*aab").following) == 6  # endings are shared
    assert len(minimal(from_regex("(?:a|b)*")).following) == 1


def test_long_phrases_are_refused():
    with pytest.raises(ConfigError, match="over 8192 states"):
        includes_any(["a" * automata.MAX_STATES])
