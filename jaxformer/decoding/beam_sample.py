"""Beam sampling: beam search among continuations that are drawn, not taken for their score."""

import jax
import jax.numpy as jnp

from jaxformer.decoding.loop import Strategy
from jaxformer.decoding.select import top_k
from jaxformer.decoding.strategies import continuations, gumbel


def beam_sample(search: Strategy) -> Strategy:
    """Draw, without replacement, the continuations that `search`, a `beam`, ranks in each step.

    A continuation is as likely to be drawn as its processed score says, which is that of the whole
    hypothesis. As many are drawn as `beam` would take (two for each beam, with one end of
    sequence), and `beam` does the rest; where all of them end, no beam lives on. A beam of 1 is one
    sample.
    """

    def choose(state, logits, ends):
        # The largest of scores under Gumbel noise are a draw without replacement (Kool et al.,
        # 2019). A beam that does not exist scores so low that no noise lifts it.
        live, rows = state.strategy[0], logits.shape[0]
        score = logits - jax.nn.logsumexp(state.logits, -1, keepdims=True) + live[..., None]
        drawn = score + gumbel(state, logits)
        most = min(continuations(search.width, state.eos_ids), drawn[0].size)
        least = top_k(drawn.reshape(rows, -1), most)[0][:, -1]
        drawn = jnp.where(drawn >= least[:, None, None], logits, -jnp.inf)
        return search.choose(state, drawn, ends)

    return search._replace(choose=choose)
