"""Models made of PyTorch's own `torch.nn.Transformer`, or of its encoder alone.

Its layers have fixed names; what is around them has the names that its author gave it, so the table
is made for them.
"""

from collections.abc import Mapping, Sequence

from jaxformer.config import hint
from jaxformer.errors import ConfigError
from jaxformer.hub.family import Family, Row, linear, norm, row

PARTS = ("embed", "source_embed", "encoder", "encoder/positions", "decoder", "decoder/positions",
         "head")  # fmt: skip
"""Modules of ours that a model of theirs may have."""
QKV = ("query", "key", "value")
ALONE, WITH_MEMORY = ((("kind", kind),) for kind in ("decoder-only", "encoder-decoder"))


def torch_family(modules: Mapping[str, str], ignored: Sequence[str] = ()) -> Family:
    """The table of a model whose modules have these names: ours, one of `PARTS`, to theirs.

    A decoder without an encoder is a `torch.nn.TransformerEncoder` under a causal mask. Raises
    `ConfigError` at a name that is none of `PARTS`.
    """
    for ours in modules:
        if ours not in PARTS:
            raise ConfigError(
                f"modules names {ours!r}; it knows {', '.join(PARTS)}.{hint(ours, PARTS)}"
            )
    rows: dict[str, tuple[Row, ...]] = {}
    for ours, theirs in modules.items():
        if ours in ("encoder", "decoder"):
            rows[ours] = _stack(ours, theirs)
        elif ours == "head":
            rows[ours] = linear("head", theirs, "v d -> d v")
        else:
            axis = {"embed": "v", "source_embed": "s"}.get(ours, "p")
            rows[ours] = (row(f"{ours}/embedding", f"{theirs}.weight", f"{axis} d -> {axis} d"),)
    return Family(
        name="torch.nn.Transformer",
        model_type="",
        architectures={},
        fields=(),
        rows=tuple(r for part in rows.values() for r in part),
        ignored=tuple(ignored),
    )


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(
            tuple(f"{ours}/{part}/kernel" for part in QKV),
            f"{theirs}.in_proj_weight",
            ("(n h) d -> d n h", "(k h) d -> d k h", "(k h) d -> d k h"),
        ),
        Row(
            tuple(f"{ours}/{part}/bias" for part in QKV),
            f"{theirs}.in_proj_bias",
            ("(n h) -> n h", "(k h) -> k h", "(k h) -> k h"),
        ),
        *linear(f"{ours}/out", f"{theirs}.out_proj", "d (n h) -> n h d"),
    )


def _stack(side: str, theirs: str) -> tuple[Row, ...]:
    ours, layer = f"{side}/layers", f"{theirs}.layers.*"
    last = norm(f"{ours}/mlp_norm", f"{layer}.norm2")
    crossed: tuple[Row, ...] = ()
    if side == "decoder":
        crossed = (
            *_attention(f"{ours}/cross", f"{layer}.multihead_attn"),
            *norm(f"{ours}/cross_norm", f"{layer}.norm2"),
            *(r._replace(only=WITH_MEMORY) for r in norm(f"{ours}/mlp_norm", f"{layer}.norm3")),
        )
        last = tuple(r._replace(only=ALONE) for r in last)
    return (
        *_attention(f"{ours}/attention", f"{layer}.self_attn"),
        *norm(f"{ours}/attention_norm", f"{layer}.norm1"),
        *linear(f"{ours}/mlp/up", f"{layer}.linear1", "f d -> d f"),
        *linear(f"{ours}/mlp/down", f"{layer}.linear2", "d f -> f d"),
        *last,
        *crossed,
        *norm(f"{side}/final_norm", f"{theirs}.norm"),
    )
