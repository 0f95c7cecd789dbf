"""Diverse beam search: groups of beams, each kept from what those before it have just chosen."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxformer.decoding.loop import Choice, DecodeState, Strategy, gather
from jaxformer.decoding.strategies import NEG

HYPOTHESES = ("tokens", "logits", "log_prob", "length", "finish", "done", "processor")
"""What the state holds of each hypothesis and a search reads."""


def diverse(search: Strategy, groups: int, diversity: float | Float[Array, ""]) -> Strategy:
    """Beam search in groups, chosen in turn within each step; `search` is the `beam` of one group.

    To a group, a token is worth `diversity` less for each beam of the groups before it that has
    just chosen this token to go on with (Hamming diversity); what is lost stays lost in the score.
    Each group has a pool of its own; at the end the pools are ranked together, so that two groups
    may bring the same text. Groups of one beam are greedy. Vijayakumar et al., 2016.
    """
    size = search.width

    def group(state: DecodeState, i: int) -> DecodeState:
        """What the search of group i sees of the state."""
        all_groups = {name: getattr(state, name) for name in HYPOTHESES}
        own = jax.tree.map(lambda leaf: leaf[:, i * size : (i + 1) * size], all_groups)
        return state._replace(**own, strategy=state.strategy[i])

    def init(tokens, limit):
        return tuple(search.init(tokens[:, :size], limit) for _ in range(groups))

    def choose(state, logits, ends):
        rows, _, vocabulary = logits.shape
        taken = jnp.zeros((rows, vocabulary), logits.dtype)
        choices = []
        for i in range(groups):
            own = logits[:, i * size : (i + 1) * size] - diversity * taken[:, None]
            choice = search.choose(group(state, i), own, ends)
            lives = (choice.state[0] > NEG).astype(taken.dtype)
            taken = taken.at[jnp.arange(rows)[:, None], choice.token].add(lives)
            choices.append(choice)
        parent, token, log_prob, stop, states = zip(*choices, strict=True)
        parent = [at + i * size for i, at in enumerate(parent)]
        parent, token, log_prob, stop = (
            jnp.concatenate(parts, 1) for parts in (parent, token, log_prob, stop)
        )
        return Choice(parent, token, log_prob, stop, states)

    def finish(state):
        pools = [search.finish(group(state, i)) for i in range(groups)]
        every = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *pools)
        return gather(every, jnp.argsort(-every.score, axis=1))

    return Strategy(groups * size, init, choose, finish)
