"""Decoding in parts, looked at on its way, guessed ahead: texts are those of the plain loop."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import accumulate
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from compilation import AS_USERS, counted
from flax import linen as nn

from jaxformer import generate, running, sharding
from jaxformer.batching import pad
from jaxformer.config import DataConfig, DecodeConfig, MeshConfig, ModelConfig
from jaxformer.data.codec import clean_up
from jaxformer.data.tokenizer import N_SPECIAL, ByteTokenizer, SymbolTokenizer, Tokenizer
from jaxformer.errors import ConfigError
from jaxformer.model import Model, before_stop, settled
from jaxformer.nn import transformer

LETTERS, BYTES = SymbolTokenizer(tuple("abcde"), ""), ByteTokenizer()
LONGEST = 64
GREEDY = DecodeConfig()
SAMPLE = DecodeConfig(temperature=1.2, seed=3)
SAMPLES = DecodeConfig(samples=2, n_best=2, seed=5)
BEAMS = DecodeConfig(beams=3, n_best=3)
STOPPED = DecodeConfig(stop=("dd", "aaaaaaaa", "bbbb", "acbb"))
"""Of greedy texts, some end soon."""


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@cache
def model(kind: str = "decoder-only", seed: int = 0, tokenizer: Tokenizer = LETTERS) -> Model:
    """A model that writes varied letters (or a few bytes) and sometimes ends; not trained."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        n_encoder_layers=int(kind == "encoder-decoder"),
        n_decoder_layers=1,
        d_model=8,
        d_ff=8,
        n_heads=2,
        max_length=LONGEST,
        embed_init_std=1.0,
        tie_embeddings=False,
        head_bias=True,
        initializer="normal",
        init_std=0.4,
        scan_layers=False,
    )
    params: Any = jax.jit(lambda: nn.unbox(transformer.init(config, jax.random.key(seed))))()
    bias = np.zeros(tokenizer.vocab_size, np.float32)
    if tokenizer is BYTES:
        bias -= 5
        bias[BYTES.encode("ab é€")] = 1
    bias[:N_SPECIAL] = -1e4
    bias[tokenizer.eos_id] = -2.0
    params = params | {"head": params["head"] | {"bias": params["head"]["bias"] + bias}}
    data = DataConfig(task="seq2seq" if config.n_encoder_layers else "lm", tokenizer="char")
    return Model(config, params, tokenizer, data, DecodeConfig())


def texts(n: int, most: int, begin: str = "") -> list[str]:
    draw = np.random.default_rng(0)
    sizes = [0, most, *draw.integers(0, most + 1, n - 2)]
    return [begin + "".join(draw.choice(list("abcde"), size)) for size in sizes]


def outcomes(results: list[Any]) -> list[list[tuple[Any, ...]]]:
    assert not any(result.error for result in results)
    return [[(h.ids, h.text, h.finish) for h in result.hypotheses] for result in results]


def streamed(made: Model, prompts: list[str], way: DecodeConfig, every: int) -> list[list[str]]:
    pieces = [list(made.stream(t, way, every=every, row=i)) for i, t in enumerate(prompts)]
    assert all(all(each) for each in pieces)  # none is empty
    return pieces


def test_what_is_streamed_is_what_is_generated():
    """Bytes, most of which are parts of characters, or of none."""
    made, prompts = model(tokenizer=BYTES), ["a", "é"]
    way = dataclasses.replace(GREEDY, stop=("é b", "€"))
    pieces = streamed(made, prompts, way, 3)
    assert ["".join(each) for each in pieces] == made.generate(prompts, way)
    assert max(map(len, pieces)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), ("é", "ab"), ("e", "cde", "d", "ba€")])
@pytest.mark.parametrize("tokenizer", [LETTERS, BYTES], ids=["letters", "bytes"])
def test_any_way_of_looking_streams_the_same(tokenizer: Tokenizer, stop: tuple[str, ...]):
    made, prompts = model(tokenizer=tokenizer), ["a", "bcc", "d e"]
    for way in (dataclasses.replace(way, stop=stop) for way in (GREEDY, SAMPLE)):
        for every in (1, 5):
            pieces = streamed(made, prompts, way, every)
            assert ["".join(each) for each in pieces] == made.generate(prompts, way)
    for options in ({"every": 0}, {"decode": BEAMS}, {"decode": DecodeConfig(lookup=2)}):
        with pytest.raises(ConfigError):
            made.stream("a", **options)


class Cleaning(SymbolTokenizer):
    """One whose texts lose spaces once it is known what follows them."""

    cleans = True

    def decode(self, ids: Iterable[int]) -> str:
        return clean_up(super().decode(ids))


@pytest.mark.slow
def test_what_a_tokenizer_cleans_up_is_streamed_as_it_will_be():
    made, prompts = model(tokenizer=Cleaning(tuple(" n't."), "")), ["n", "t", "nt"]
    for seed in range(4):
        way = dataclasses.replace(SAMPLE, seed=seed)
        wanted = made.generate(prompts, way)
        for every in (1, 3):
            assert ["".join(p) for p in streamed(made, prompts, way, every)] == wanted


def test_what_is_settled_stays():
    stops = (". ", "\n\n", "é!")
    for text in ("To be. Or", "a.b", "a\n \n\nb", "é!", "oui é", "\ufffd", "a\ufffdb"):
        final = before_stop(text, stops)
        told = [settled(text[:n], stops) for n in range(len(text) + 1)]
        assert all(final.startswith(each) for each in told)
        assert all(b.startswith(a) for a, b in zip(told, told[1:], strict=False))


def test_the_stop_that_is_whole_first_counts_however_tokens_cut_the_text():
    stops = ("b", "abc", "cd", "xab")
    for text in ("cabc", "xabc", "acde", "none", "ab", "bbb"):
        whole = [n for n in accumulate(1 for _ in text) if any(s in text[:n] for s in stops)]
        for n in whole:
            assert before_stop(text[:n], stops) == before_stop(text, stops)
    assert before_stop("cabc", stops) == "ca" and before_stop("xabc", stops) == ""


def check_stops(way: DecodeConfig, tokenizer: Tokenizer, stops: tuple[str, ...]) -> int:
    """How many texts end with the token that makes a stop whole, as what stands before it."""
    made, prompts = model(tokenizer=tokenizer), ["a", "dde", "cc"]
    free = made.hypotheses(prompts, way)
    found = made.hypotheses(prompts, dataclasses.replace(way, stop=stops))
    stopped = 0
    for plain, result in zip(free, found, strict=True):
        for h in result.hypotheses:
            spelt = tokenizer.decode(h.ids)
            assert (h.finish == "stop") == any(s in spelt for s in stops)
            assert h.text == before_stop(spelt, stops)
            assert not any(s in tokenizer.decode(h.ids[:-1]) for s in stops)
            stopped += h.finish == "stop"
            if way.beams == 1:
                [whole] = [f for f in plain.hypotheses if f.ids[: len(h.ids)] == h.ids]
                assert h.text == before_stop(whole.text, stops)
    return stopped


@pytest.mark.slow
@pytest.mark.parametrize("way", [GREEDY, SAMPLES, BEAMS], ids=["greedy", "samples", "beams"])
def test_texts_end_right_before_any_stop(way: DecodeConfig):
    assert sum(check_stops(way, LETTERS, s) for s in (("b",), ("dd", "ec", "abc", "ca", "eb")))
    assert sum(check_stops(way, BYTES, s) for s in (("é",), ("€", "b"), ("a ", "b ", "é")))


def over(devices: int, made: Model) -> Model:
    """The model with a copy on each of so many devices."""
    if devices == 1:
        return made
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    params = jax.device_put(made.params, sharding.replicated(mesh))
    return dataclasses.replace(made, params=params)


def check_rows(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    way: DecodeConfig,
    prompts: list[str],
    size: int = 4,
    devices: int = 1,
) -> None:
    """Rows that hand on their places give what each prompt gives alone."""
    done = dict.fromkeys(("_refill", "_slide"), 0)
    for name in done:

        def watched(name: str, real: Any, *arguments: Any) -> Any:
            done[name] += 1
            state = real(*arguments)
            assert len(state.t) == devices * size
            assert {len(part.data) for part in state.t.addressable_shards} == {size}
            return state

        monkeypatch.setattr(running, name, partial(watched, name, getattr(running, name)))
    made = model(kind)
    together = over(devices, made).hypotheses(prompts, dataclasses.replace(way, batch_size=size))
    assert all(done.values()), done
    alone = [made.hypotheses([text], way, first_row=i)[0] for i, text in enumerate(prompts)]
    assert outcomes(together) == outcomes(alone)
    assert len({len(h.ids) for r in alone for h in r.hypotheses}) > 3
    for one, other in zip(together, alone, strict=True):
        for h, g in zip(one.hypotheses, other.hypotheses, strict=True):
            assert (h.score, h.log_prob) == pytest.approx((g.score, g.log_prob), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("decoder-only", STOPPED),
        ("decoder-only", SAMPLES),
        ("decoder-only", DecodeConfig(beams=3, samples=1, n_best=3, seed=7)),
        ("decoder-only",
         dataclasses.replace(SAMPLE, no_repeat_ngram=3, encoder_no_repeat_ngram=2, min_length=3,
                             repetition_penalty=1.2, forced_last=LETTERS.eos_id)),
        ("encoder-decoder", STOPPED),
        ("encoder-decoder", dataclasses.replace(BEAMS, stop=("ab", "ce"))),
    ],
)  # fmt: skip
def test_rows_in_others_places_are_as_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str, way: DecodeConfig
):
    check_rows(monkeypatch, kind, way, texts(40, 14))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("decoder-only", STOPPED),
        ("decoder-only", dataclasses.replace(BEAMS, stop=("ab", "ce"))),
        ("encoder-decoder", SAMPLES),
    ],
)
def test_rows_in_others_places_on_any_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, way: DecodeConfig
):
    check_rows(monkeypatch, kind, way, texts(45, 14), size=2, devices=3)


def test_devices_decode_each_their_rows():
    made = over(4, model())
    batch = pad([made.prompt(text) for text in texts(8, 6)], 8, LETTERS.pad_id, 4)
    method, job = generate.request(made.config, LETTERS, batch, range(8), GREEDY)
    mesh: Any = sharding.copies(made._prepared)
    found = generate._decode(mesh, made.config, None, method, made._prepared, None, job)
    assert [len(part.data) for part in found.tokens.addressable_shards] == [2] * 4
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_decode", lambda mesh, *_: asked.append(mesh))
        generate.decode_batch(made.config, made._prepared, LETTERS, batch, range(8), GREEDY)
    assert asked == [mesh]


@pytest.mark.slow
@pytest.mark.parametrize("way", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("room", [LONGEST, 8 * LONGEST])
def test_the_cache_of_one_row_is_not_copied(room: int, way: DecodeConfig):
    made = model()
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, max_length=room))
    batch = pad([made.prompt("ab")], 8, LETTERS.pad_id)
    method, job = generate.request(made.config, LETTERS, batch, [0], way)
    state = jax.eval_shape(partial(generate.begin, made.config, method), made._prepared, job)
    step = jax.jit(partial(generate.advance, made.config, method, chunk=4), donate_argnums=2)
    text = step.lower(made._prepared, job, state).compile(compiler_options=AS_USERS).as_text()
    _, heads, slots, size = state.cache.cache.own[0].k.shape
    cached = rf"= f32\[(1,)?{heads},{slots},{size}\]\S*"
    assert re.search(rf"{cached} dynamic-update-slice\(", text)
    assert not re.search(rf"{cached} copy\(", text)


@pytest.mark.slow
def test_a_draft_goes_where_the_model_is():
    made = model()
    wanted = made.generate(["ab"], SAMPLE)
    for n, m in ((2, 1), (1, 2), (2, 3)):
        assert over(n, made).generate(["ab"], SAMPLE, draft=over(m, made)) == wanted


@pytest.mark.slow
def test_devices_with_more_places_than_prompts():
    made, prompts = model(), texts(3, 6)
    spread, ids = over(4, made), list(map(made.prompt, prompts))
    known = made.config, spread._prepared, LETTERS
    looks = running.decode_rows(*known, ids, 8, range(3), SAMPLE)
    found = {row: decoded.tokens[at] for rows, decoded in looks for at, row in enumerate(rows)}
    for i, text in enumerate(prompts):
        [h] = made.hypotheses([text], SAMPLE, first_row=i)[0].hypotheses
        assert tuple(found[i][0, : len(h.ids)].tolist()) == h.ids
    assert sorted(found) == [0, 1, 2]


@pytest.mark.slow
def test_after_warmup_on_several_devices_nothing_is_compiled():
    made, way = over(2, model(seed=5)), dataclasses.replace(SAMPLE, batch_size=4, max_length=9)
    assert made.warmup(way, (5,), (1, 3, 40)) == [(2, 8), (4, 8), (8, 8)]
    with counted() as anew:
        for n in (1, 2, 3, 4, 20, 37):
            made.hypotheses(texts(40, 6)[:n], way)
    assert not anew


@pytest.mark.slow
def test_after_warmup_for_one_at_a_time_nothing_is_compiled():
    made, way = model(seed=6), dataclasses.replace(SAMPLE, batch_size=1, max_length=9)
    assert made.warmup(way, (40,), (3,)) == [(1, 64)]
    with counted() as anew:
        made.hypotheses(texts(4, 6, "abcde" * 7), way)
    assert not anew


@pytest.mark.slow
def test_no_place_is_left_empty_while_prompts_wait(monkeypatch: pytest.MonkeyPatch):
    """Three of eight that end at once (not a power of two) are all followed by others."""
    made, held = model(), []
    real: Any = running._advance

    def looked(*arguments: Any) -> Any:
        state = real(*arguments)
        held.append(int(np.asarray(state.done.all(1)).sum()))
        return state

    monkeypatch.setattr(running, "_advance", looked)
    prompts = [made.prompt(text) for text in texts(60, 6)]
    found = {}
    way = dataclasses.replace(SAMPLE, batch_size=8)
    places = running.decode_rows(
        made.config, made._prepared, LETTERS, prompts, 8, range(len(prompts)), way
    )
    for rows, _ in places:
        assert rows
        found |= dict.fromkeys(rows)
        # A quarter of the places may be empty, and no more, until none waits.
        if len(found) < 60 - 8:
            assert held[-1] - len(rows) < 2
    assert sorted(found) == list(range(60))


def check_prompts(way: DecodeConfig, begin: str, prefill: int) -> None:
    """Prompts read together, in pieces, or with their beginning once, and each alone and whole."""
    made, prompts = model(), texts(5, 12, begin)
    ids = [made.prompt(text) for text in prompts]
    shared = generate.shared(pad(ids, 64, LETTERS.pad_id))
    assert shared == (32 if len(begin) >= 32 else 0)
    alone = [made.hypotheses([text], way, first_row=i)[0] for i, text in enumerate(prompts)]
    together = made.hypotheses(prompts, dataclasses.replace(way, prefill=prefill))
    assert outcomes(together) == outcomes(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [GREEDY, SAMPLES, BEAMS, DecodeConfig(contrastive=3), DecodeConfig(lookup=3)]
)
def test_beginnings_and_pieces(way: DecodeConfig):
    for begin, prefill in (("abcde" * 8, 8), ("abcde" * 8, 512), ("abcde" * 5, 5)):
        check_prompts(dataclasses.replace(way, max_length=12), begin, prefill)


def check_draft(monkeypatch: pytest.MonkeyPatch, kind: str, way: DecodeConfig) -> None:
    """A draft model guesses, and changes no text."""
    made, prompts = model(kind), [*texts(5, 14), "a" * (LONGEST - 3)]
    ids, guessed = list(map(made.prompt, prompts)), []
    real: Any = generate.draft
    monkeypatch.setattr(generate, "draft", lambda *a: guessed.append(a[-1]) or real(*a))
    for seed in (0, 1):  # the model itself, and another
        found = made.complete(ids, way, draft=model(kind, seed))
        assert outcomes(found) == outcomes(made.complete(ids, way))
    assert set(guessed) == {way.guesses}


def test_a_draft_model_is_asked(monkeypatch: pytest.MonkeyPatch):
    class Asked(Exception):
        pass

    def decode(mesh: Any, config: Any, smaller: Any, method: Any, *_: Any) -> Any:
        raise Asked(smaller, method.guesses)

    monkeypatch.setattr(generate, "_decode", decode)  # compiles nothing
    made = model()
    for draft, guesses in ((made, 3), (None, 0)):
        with pytest.raises(Asked) as asked:
            made.generate(["a"], DecodeConfig(guesses=3), draft=draft)
        assert asked.value.args == (draft and draft.config, guesses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("decoder-only", GREEDY),
        ("encoder-decoder", SAMPLE),
        ("decoder-only",
         dataclasses.replace(SAMPLE, guesses=1, stop=("ab", "dd"), repetition_penalty=1.2,
                             no_repeat_ngram=3, frequency_penalty=0.2, forced_last=LETTERS.eos_id)),
    ],
)  # fmt: skip
def test_draft_models_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, way: DecodeConfig):
    check_draft(monkeypatch, kind, way)


def test_a_draft_that_cannot_be_is_refused():
    made = model()
    for draft, way, says in (
        (model(tokenizer=BYTES), GREEDY, "another tokenizer"),
        (model("encoder-decoder"), GREEDY, "the draft model is encoder-decoder"),
        (made, BEAMS, "leave beams"),
    ):
        with pytest.raises(ConfigError, match=says):
            made.generate(["a"], way, draft=draft)
