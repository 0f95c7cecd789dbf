"""Text in, text out: properties of a loaded model and of models with lively parameters."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from compilation import counted
from flax import linen as nn

import jaxformer
from jaxformer import run
from jaxformer.batching import pad
from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data import pipeline
from jaxformer.data.tokenizer import N_SPECIAL, SymbolTokenizer
from jaxformer.decoding.mbr import expected_chrf
from jaxformer.errors import ConfigError
from jaxformer.generate import _decode
from jaxformer.model import Model
from jaxformer.nn import transformer
from jaxformer.training import loop
from jaxformer.training.loop import fit

LETTERS = SymbolTokenizer(tuple("abcde"), "")
TEXTS = ["", "a", "ebc", "dd", "abcde", "cabbed", "bead"]  # all in one bucket: one compilation
LONGEST = 16


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@cache
def parameters(config: ModelConfig) -> dict[str, Any]:
    return jax.jit(lambda: nn.unbox(transformer.init(config, jax.random.key(0))))()


def model(kind: str, eos: float = 0.0) -> Model:
    """A model that writes varied letters and sometimes ends; nothing is trained."""
    config = ModelConfig(
        vocab_size=LETTERS.vocab_size,
        n_encoder_layers=int(kind == "encoder-decoder"),
        n_decoder_layers=1,
        d_model=8,
        d_ff=8,
        n_heads=2,
        max_length=LONGEST,
        embed_init_std=1.0,
        tie_embeddings=False,  # or each token would repeat itself
        head_bias=True,
        initializer="normal",
        init_std=0.4,
        scan_layers=False,
    )
    bias = np.zeros(LETTERS.vocab_size, np.float32)
    bias[:N_SPECIAL] = -1e4  # ids that stand for no text would not come back from it
    bias[LETTERS.eos_id] = eos
    params = parameters(config)
    params = params | {"head": params["head"] | {"bias": params["head"]["bias"] + bias}}
    data = DataConfig(task="seq2seq" if config.n_encoder_layers else "lm", tokenizer="char")
    return Model(config, params, LETTERS, data, DecodeConfig())


@pytest.fixture(scope="module", params=["encoder-decoder", "decoder-only"])
def lively(request: pytest.FixtureRequest) -> Model:
    return model(request.param)


def compiled() -> int:
    """How many decoding functions have been compiled."""
    function: Any = _decode
    return function._cache_size()


GREEDY = DecodeConfig()
BEAMS = DecodeConfig(beams=3, n_best=3)
SAMPLES = DecodeConfig(samples=3, n_best=3, seed=7)
DIVERSE = DecodeConfig(beams=4, groups=2, n_best=3)
BEAM_SAMPLES = DecodeConfig(beams=3, samples=1, n_best=3, seed=7)
CONTRASTIVE = DecodeConfig(contrastive=3)
WAYS = {
    "greedy": GREEDY, "beam": BEAMS, "sample": SAMPLES,
    "diverse": DIVERSE, "beam_sample": BEAM_SAMPLES, "contrastive": CONTRASTIVE,
}  # fmt: skip
QUICK = ("greedy", "beam", "sample")
ways = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, way in WAYS.items()
    ],
)


def assert_same(a: list, b: list) -> None:
    """The same hypotheses; their scores as near as other shapes allow."""
    for x, y in zip(a, b, strict=True):
        assert x.error == y.error
        assert [(h.ids, h.finish) for h in x.hypotheses] == [
            (h.ids, h.finish) for h in y.hypotheses
        ]
        for g, h in zip(x.hypotheses, y.hypotheses, strict=True):
            assert (g.score, g.log_prob) == pytest.approx((h.score, h.log_prob), abs=1e-4)


@ways
def test_the_score_of_decoding_is_that_of_scoring(lively: Model, way: DecodeConfig):
    results = lively.hypotheses(TEXTS, way)
    ended = []
    for text, result in zip(TEXTS, results, strict=True):
        assert len(result.hypotheses) == way.n_best and not result.error
        scores = [h.score for h in result.hypotheses]
        assert scores == sorted(scores, reverse=True)
        for h in result.hypotheses:
            penalty = ((5 + len(h.ids)) / 6) ** way.length_penalty if way.beams > 1 else 1
            if way.groups == 1:  # else what groups took from each other is in the score
                assert h.score == pytest.approx(h.log_prob / penalty, abs=1e-4)
            if h.finish == "eos":
                assert LETTERS.encode(h.text) == list(h.ids[:-1])
                ended.append((text, h))
            else:
                taken = 1 if lively.config.n_encoder_layers else len(text) + 1
                assert h.finish == "limit" and len(h.ids) == LONGEST - taken
    assert len(ended) >= 2
    scores = lively.score([text for text, _ in ended], [h.text for _, h in ended])
    assert scores == pytest.approx([h.log_prob for _, h in ended], abs=1e-4)


@ways
def test_each_token_is_told_with_what_might_have_stood_there(lively: Model, way: DecodeConfig):
    plain = lively.hypotheses(TEXTS, way)
    before = compiled()
    asked = lively.hypotheses(TEXTS, dataclasses.replace(way, alternatives=3))
    only = lively.hypotheses(TEXTS, dataclasses.replace(way, token_log_probs=True))
    assert compiled() == before  # the loop is as it was
    chosen = 0
    for one, other, bare in zip(plain, asked, only, strict=True):
        for p, h, b in zip(one.hypotheses, other.hypotheses, bare.hypotheses, strict=True):
            assert h._replace(token_log_probs=(), alternatives=()) == p
            assert b == h._replace(alternatives=(), token_log_probs=b.token_log_probs)
            assert b.token_log_probs == pytest.approx(h.token_log_probs, abs=1e-5)
            assert len(h.token_log_probs) == len(h.alternatives) == len(h.ids)
            assert sum(h.token_log_probs) == pytest.approx(h.log_prob, abs=1e-4)
            assert not {"token_log_probs", "alternatives"} & p.record().keys()
            assert h.record()["alternatives"][0][0]["id"] == h.alternatives[0][0].id
            for i, log_prob, tops in zip(h.ids, h.token_log_probs, h.alternatives, strict=True):
                found = [top.log_prob for top in tops]
                assert len(tops) == 3 and found == sorted(found, reverse=True)
                assert log_prob <= found[0] + 1e-5
                assert all(top.text == LETTERS.decode([top.id]) for top in tops)
                if i in [top.id for top in tops]:
                    at = [top.id for top in tops].index(i)
                    assert log_prob == pytest.approx(found[at], abs=1e-5)
                    chosen += 1
                elif log_prob < found[-1]:
                    chosen += 1
                if way == GREEDY:
                    assert tops[0].id == i
    assert chosen == sum(len(h.ids) for result in plain for h in result.hypotheses)


@ways
def test_neither_batch_nor_order_matters(way: DecodeConfig):
    lively = model("decoder-only")
    together = lively.hypotheses(TEXTS, way)
    assert_same(together, lively.hypotheses(TEXTS, dataclasses.replace(way, batch_size=1)))
    if way.samples:  # the key of a row is its place
        again = [lively.hypotheses([t], way, first_row=i)[0] for i, t in enumerate(TEXTS)]
        assert_same(together, again)
        distinct = {h.ids for result in together for h in result.hypotheses}
        assert len(distinct) > len(TEXTS)
        other = lively.hypotheses(TEXTS, dataclasses.replace(way, seed=8))
        assert distinct != {h.ids for result in other for h in result.hypotheses}
    else:
        assert_same(together, lively.hypotheses(TEXTS[::-1], way)[::-1])


def test_what_is_exactly_greedy():
    lively = model("decoder-only")
    greedy = lively.hypotheses(TEXTS, GREEDY)
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
    ]
    for option in ways:
        assert_same(greedy, lively.hypotheses(TEXTS, DecodeConfig(**option)))
    assert lively.generate(TEXTS) == [r.hypotheses[0].text for r in greedy]


def test_numbers_compile_nothing_anew():
    lively = model("decoder-only")
    lively.hypotheses(TEXTS, DecodeConfig(temperature=0.7))
    lively.hypotheses(TEXTS, DecodeConfig(beams=3, length_penalty=0.5))
    before = compiled()
    options: list[dict[str, Any]] = [
        {"temperature": 2}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3},
        {"min_p": 0.1}, {"min_p": 1}, {"samples": 1, "seed": 3},
    ]  # fmt: skip
    for option in options:
        lively.hypotheses(TEXTS, DecodeConfig(**option))
    lively.hypotheses(TEXTS[::-1], DecodeConfig(beams=3, length_penalty=1))
    assert compiled() == before
    lively.hypotheses(TEXTS, DecodeConfig(samples=2))
    assert compiled() > before


def test_numbers_of_other_strategies_compile_nothing_anew():
    lively = model("decoder-only")
    first: list[dict[str, Any]] = [
        {"beams": 4, "groups": 2}, {"beams": 3, "temperature": 0.5}, {"contrastive": 3},
    ]  # fmt: skip
    then: list[dict[str, Any]] = [
        {"beams": 4, "groups": 2, "diversity": 2, "length_penalty": 0},
        {"beams": 3, "top_k": 2, "seed": 3},
        {"contrastive": 3, "penalty_alpha": 0.1},
    ]
    for option in first:
        lively.hypotheses(TEXTS, DecodeConfig(**option))
    before = compiled()
    for option in then:
        lively.hypotheses(TEXTS, DecodeConfig(**option))
    assert compiled() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_contrastive_search_is_that_of_the_paper(kind: str):
    """Every candidate through the whole model, without a cache."""
    lively = model(kind, eos=-2.0)
    k, alpha, length, config = 4, 0.8, 6, lively.config
    run = jax.jit(partial(transformer.apply, config), static_argnames="method")
    params = lively.params

    def states(prompt: list[int], text: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Last hidden states, and the probability of each next token after the last."""
        ids = [LETTERS.start_id, *text] if config.n_encoder_layers else [*prompt, *text]
        memory = memory_seg = None
        if config.n_encoder_layers:
            source = pad([prompt], LONGEST, LETTERS.pad_id)
            memory, memory_seg = run(params, source, method="encode"), source.seg
        target = pad([ids], LONGEST, LETTERS.pad_id)
        hidden, _ = run(params, target, memory, memory_seg, method="decode")
        logits = run(params, hidden[:, len(ids) - 1], method="unembed")
        return np.asarray(hidden[0, : len(ids)]), np.asarray(jax.nn.softmax(logits[0]))

    different = 0
    way = DecodeConfig(contrastive=k, penalty_alpha=alpha, max_length=length)
    greedy = lively.hypotheses(TEXTS[1:5], DecodeConfig(max_length=length))
    found = lively.hypotheses(TEXTS[1:5], way)
    for text, result, other in zip(TEXTS[1:5], found, greedy, strict=True):
        prompt, ids = lively.prompt(text), []
        while len(ids) < length and LETTERS.eos_id not in ids:
            _, probability = states(prompt, ids)
            values = {}
            for token in np.argsort(-probability)[:k].tolist():
                hidden, _ = states(prompt, [*ids, token])
                *past, new = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
                values[token] = (1 - alpha) * probability[token] - alpha * max(past @ new)
            ids.append(max(values, key=lambda token: values[token]))
        assert result.hypotheses[0].ids == tuple(ids)
        different += other.hypotheses[0].ids != tuple(ids)
    assert different


@pytest.mark.slow
def test_one_candidate_is_greedy_and_more_than_the_vocabulary_are_all():
    lively, size = model("decoder-only"), LETTERS.vocab_size
    greedy = lively.hypotheses(TEXTS, GREEDY)
    assert_same(greedy, lively.hypotheses(TEXTS, DecodeConfig(contrastive=1)))
    every = DecodeConfig(contrastive=size)
    assert_same(greedy, lively.hypotheses(TEXTS, dataclasses.replace(every, penalty_alpha=0)))
    more = dataclasses.replace(every, contrastive=2 * size)
    assert_same(lively.hypotheses(TEXTS, every), lively.hypotheses(TEXTS, more))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_looking_up_changes_nothing_but_the_passes(kind: str):
    lively = model(kind, eos=-2.0)
    drawn = DecodeConfig(temperature=0.7, seed=3, forced_last=LETTERS.eos_id)
    for way, k, size in ((GREEDY, 3, 1), (drawn, 20, 64)):
        options = dataclasses.replace(way, lookup=k, batch_size=size)
        assert_same(lively.hypotheses(TEXTS, options), lively.hypotheses(TEXTS, way))


@pytest.mark.slow
def test_minimum_bayes_risk_ranks_the_same_samples():
    lively = model("decoder-only", eos=-2.0)
    samples = DecodeConfig(samples=8, n_best=8, seed=7)
    plain = lively.hypotheses(TEXTS, samples)
    ranked = lively.hypotheses(TEXTS, dataclasses.replace(samples, mbr=True))
    best = lively.hypotheses(TEXTS, dataclasses.replace(samples, mbr=True, n_best=1))
    moved = 0
    for x, y, z in zip(plain, ranked, best, strict=True):
        assert sorted(h.ids for h in x.hypotheses) == sorted(h.ids for h in y.hypotheses)
        texts = [h.text for h in y.hypotheses]
        scores = [h.score for h in y.hypotheses]
        assert scores == pytest.approx(expected_chrf(texts))
        assert scores == sorted(scores, reverse=True)
        assert z.hypotheses == y.hypotheses[:1]
        moved += x.hypotheses[0].ids != y.hypotheses[0].ids
    assert moved


@pytest.mark.slow
def test_numbers_of_penalties_compile_nothing_anew():
    lively = model("decoder-only")
    on = dict(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, typical_p=0.9,
              epsilon=0.01, eta=0.01, length_decay=1.1, logit_bias=((4, 1.0),))  # fmt: skip
    first = lively.hypotheses(TEXTS, DecodeConfig(**on, seed=1))
    before = compiled()
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 3}, {"presence_penalty": 4}, {"frequency_penalty": -4},
        {"typical_p": 0.1}, {"epsilon": 0.5}, {"eta": 0.5}, {"length_decay": 9.0},
        {"logit_bias": ((4, 9.0),)},
    ]  # fmt: skip
    for option in options:
        assert lively.hypotheses(TEXTS, DecodeConfig(**on | option, seed=1)) != first
    assert compiled() == before


@pytest.mark.parametrize("way", [GREEDY, BEAMS, SAMPLES], ids=["greedy", "beam", "sample"])
def test_bad_words_are_not_written(way: DecodeConfig):
    lively, way = model("encoder-decoder"), dataclasses.replace(way, min_length=3)
    free = [h.text for r in lively.hypotheses(TEXTS, way) for h in r.hypotheses]
    pairs = Counter(text[i : i + 2] for text in free for i in range(len(text) - 1))
    word = pairs.most_common(1)[0][0]
    banned = dataclasses.replace(way, bad_words=(word, "xyz"), bad_ids=((LETTERS.eos_id,),))
    found = [h for r in lively.hypotheses(TEXTS, banned) for h in r.hypotheses]
    assert not any(word in h.text for h in found)
    assert any(h.finish == "eos" for h in found)  # a bare end is no bad word


def beginning_alike(alike: int, rows: int) -> list[str]:
    """Texts of 42 to 44 letters, of which so many are the same."""
    return ["a" * alike + "bcde"[i % 4] * (44 - i % 3 - alike) for i in range(rows)]


def unlike(kind: str, max_length: int) -> Model:
    """A model for which nothing has been compiled, if no other test has one of this length."""
    writer = model(kind)
    return dataclasses.replace(
        writer, config=dataclasses.replace(writer.config, max_length=max_length)
    )


@pytest.mark.parametrize(
    "kind", ["decoder-only", pytest.param("encoder-decoder", marks=pytest.mark.slow)]
)
def test_lengths_compile_once_a_bucket(kind: str):
    writer, before = unlike(kind, 52), compiled()
    for length in range(50):  # 1 to 50 tokens, and room for 51 to 2 more after them
        writer.hypotheses(["a" * length], GREEDY)
    assert compiled() - before == 4  # 8, 16, 32 and 64


@pytest.mark.slow
def test_rows_and_beginnings_compile_once_a_power_of_two():
    writer, before = unlike("decoder-only", 53), compiled()
    for rows in range(1, 9):
        writer.hypotheses([TEXTS[i % 7] for i in range(rows)], GREEDY)
    assert compiled() - before == 4  # 1, 2, 4 and 8
    for alike in range(40):
        writer.hypotheses(beginning_alike(alike, 8), GREEDY)
    assert compiled() - before == 4 + 2  # none, or 32 tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("decoder-only", DecodeConfig(samples=2, n_best=2)),
        ("decoder-only", DecodeConfig(lookup=3, regex="[a-e]*")),
        ("encoder-decoder", DecodeConfig(beams=3, stop=("ab",), bad_words=("cc",))),
    ],
)
def test_after_warmup_nothing_is_compiled(kind: str, way: DecodeConfig):
    writer = unlike(kind, 24)
    assert writer.warmup(way, (7, 3), (1, 2)) == [(1, 8), (2, 8)]
    numbers: dict[str, Any] = {"seed": 5}
    if way.sampling:
        numbers |= {"temperature": 0.7, "top_p": 0.9, "top_k": 2}
    for options in (way, dataclasses.replace(way, **numbers)):
        with counted() as anew:
            writer.hypotheses(["abc"], options)
            writer.hypotheses(["", "ebcad"], options)
        assert not anew
    with counted() as anew:
        writer.hypotheses(TEXTS[:3], way)
    assert anew


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("decoder-only", DecodeConfig(beams=3)),
        ("decoder-only", DecodeConfig(contrastive=3)),
        ("encoder-decoder", DecodeConfig(samples=2, n_best=2)),
    ],
)
def test_warmup_is_for_any_beginning_and_more_texts_than_are_decoded_at_once(
    kind: str, way: DecodeConfig
):
    way = dataclasses.replace(way, batch_size=4, max_length=6)
    writer = unlike(kind, 70 + way.width)  # another for each way, but for the numbers
    warm = writer.warmup(way, range(33, 60), (4, 9))
    assert set(warm) == {(1, 64), (4, 64)} if way.contrastive else {(4, 64)}
    with counted() as anew:
        for alike in (0, 33, 40):
            for rows in (3, 4, 9):
                writer.hypotheses(beginning_alike(alike, rows), way)
    assert not anew


@pytest.mark.slow
def test_warmup_takes_what_fits():
    writer = unlike("decoder-only", 23)
    assert writer.warmup(GREEDY, (99,), (1,)) == [(1, 32)]


def test_more_than_the_vocabulary():
    lively = model("decoder-only")
    size = LETTERS.vocab_size
    wide = DecodeConfig(beams=size + 3, n_best=size + 3, max_length=3)
    for result in lively.hypotheses(TEXTS[:2], wide):
        found = [h.ids for h in result.hypotheses]
        assert len(set(found)) == len(found) == size + 3
        assert all(np.isfinite([h.score, h.log_prob]).all() for h in result.hypotheses)
    wide = DecodeConfig(top_k=size + 3, samples=3, n_best=3, seed=7)
    assert_same(lively.hypotheses(TEXTS, wide), lively.hypotheses(TEXTS, SAMPLES))


def test_the_end_first_is_empty_text():
    mute = model("decoder-only", eos=50.0)
    for way in (GREEDY, SAMPLES):
        for result in mute.hypotheses(TEXTS, way):
            for h in result.hypotheses:
                assert (h.text, h.ids, h.finish) == ("", (LETTERS.eos_id,), "eos")
                assert h.log_prob == pytest.approx(0, abs=1e-6)
    for result in mute.hypotheses(TEXTS, BEAMS):
        best, *others = result.hypotheses
        assert (best.text, best.ids, best.finish) == ("", (LETTERS.eos_id,), "eos")
        assert best.log_prob == pytest.approx(0, abs=1e-6)
        assert all(np.isfinite([h.score, h.log_prob]).all() for h in others)


@ways
def test_nothing_left_to_say_is_a_dead_end(way: DecodeConfig):
    every = dataclasses.replace(way, suppress=tuple(range(LETTERS.vocab_size)))
    for result in model("decoder-only").hypotheses(TEXTS, every):
        assert len(result.hypotheses) == way.n_best
        for h in result.hypotheses:
            assert (h.text, h.ids, h.finish) == ("", (), "dead_end")
            assert np.isfinite([h.score, h.log_prob]).all()


def test_a_text_too_long_fails_alone(lively: Model):
    # An encoder reads the end too; a decoder needs a start, and room for one more token.
    most = LONGEST - (1 if lively.config.n_encoder_layers else 2)
    texts = ["abcdeabcd", "a" * (most + 1), "a" * most, "a" * 97]
    results = lively.hypotheses(texts, GREEDY)
    assert [bool(result.error) for result in results] == [False, True, False, True]
    assert "the text has 98 tokens" in results[3].error
    assert f"max_length {LONGEST}" in results[3].error
    assert_same([results[0], results[2]], lively.hypotheses([texts[0], texts[2]], GREEDY))
    assert len(results[2].hypotheses) == 1 and len(results[2].hypotheses[0].ids) >= 1
    with pytest.warns(UserWarning, match="text 0: the text has"):
        assert lively.generate([texts[1]]) == [""]
    with pytest.raises(ConfigError, match="pair 0 has"):
        lively.score(["a"], ["a" * 99])
    assert lively.hypotheses([], GREEDY) == [] and lively.score([], []) == []


def test_max_length_and_the_default_options():
    lively = model("decoder-only", eos=-1.0)
    short = dataclasses.replace(lively, defaults=DecodeConfig(max_length=2, top_k=1))
    results = short.hypotheses(TEXTS)
    assert {len(r.hypotheses[0].ids) for r in results} == {1, 2}
    assert Counter(r.hypotheses[0].finish for r in results).keys() <= {"eos", "limit"}


@pytest.mark.parametrize("way", [GREEDY, BEAMS], ids=["greedy", "beam"])
def test_a_forced_end_stands_however_many_tokens_are_asked_for(way: DecodeConfig):
    forced = dataclasses.replace(
        way, max_length=4, min_length=4, forced_last=LETTERS.eos_id, n_best=1
    )
    for result in model("decoder-only").hypotheses(TEXTS[:4], forced):
        (h,) = result.hypotheses
        assert h.finish == "eos" and len(h.ids) == 4 and h.ids.index(LETTERS.eos_id) == 3


# A trained run.


@pytest.mark.slow
def test_a_run_loads():
    run_dir = tiny.reversing_run()
    trained = jaxformer.load(str(run_dir))
    config, data = loop.prepare(run.read(run_dir)[0], run_dir)
    assert (trained.config, trained.tokenizer, trained.defaults) == (
        config.model, data.tokenizer, config.decode,
    )  # fmt: skip
    assert tiny.leaves(trained.params) == tiny.leaves(tiny.last_state(run_dir).state.params)
    assert tiny.leaves(jaxformer.load(run_dir, step=5).params) != tiny.leaves(trained.params)
    batch = next(pipeline.evaluation_batches(config.data, data.valid, data.tokenizer, multiple=1))
    logits = trained.logits(batch)
    assert logits.shape == (*batch.labels.shape, config.model.vocab_size)
    assert batch.source
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    log_prob = np.take_along_axis(log_probs, batch.labels[..., None], -1)[..., 0]
    texts = [[t.decode(row.tolist()) for row in ids]
             for t in [trained.tokenizer] for ids in (batch.source.ids, batch.labels)]  # fmt: skip
    assert trained.score(*texts) == pytest.approx((log_prob * batch.weights).sum(1), abs=1e-4)


def test_an_encoder_generates_nothing():
    reader = Model(dataclasses.replace(tiny.MODEL, vocab_size=9), {}, LETTERS, DataConfig())
    with pytest.raises(ConfigError, match="encoder-only model generates no text"):
        reader.generate(["a"])


@pytest.mark.slow
def test_adapters_are_merged_on_loading(tmp_path: Path):
    config = tiny.reverse(tmp_path)
    config = dataclasses.replace(
        config,
        steps=3,
        metrics=(),
        init_from=str(tiny.reversing_run()),
        model=dataclasses.replace(
            config.model, lora_rank=2, lora_targets=("query", "value", "up", "down")
        ),
        optim=dataclasses.replace(config.optim, learning_rate=0.1, warmup=0),
    )
    fit(config)
    resolved, data = loop.prepare(run.read(tmp_path)[0], tmp_path)
    tuned, base = jaxformer.load(tmp_path), jaxformer.load(tiny.reversing_run())
    assert tuned.config == dataclasses.replace(resolved.model, lora_rank=0)
    assert tuned.tokenizer == base.tokenizer
    assert jax.tree.structure(tuned.params) == jax.tree.structure(base.params)
    batch = next(pipeline.evaluation_batches(config.data, data.valid, data.tokenizer, multiple=1))
    params = tiny.last_state(tmp_path).state.params
    adapted = jax.jit(transformer.apply, static_argnums=0)(resolved.model, params, batch)
    np.testing.assert_allclose(tuned.logits(batch), adapted, atol=1e-5)
    assert not np.allclose(base.logits(batch), adapted, atol=1e-2)
    changed = {k for k, v in tiny.leaves(tuned.params).items() if v != tiny.leaves(base.params)[k]}
    assert changed and all("kernel" in k for k in changed)
    assert not any("embed" in k or "norm" in k or "out" in k for k in changed)
