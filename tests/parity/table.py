"""The table of families in the documentation: python tests/parity/table.py > docs/families.md"""

from checkpoints import CHECKPOINTS

from jaxformer.hub.families import FAMILIES

HEADER = """\
# Families of checkpoints

What `jaxformer.load`, `jaxformer convert` and `--run` (but of `jaxformer evaluate`) read, and what
`jaxformer convert` writes. Each family is a table in `jaxformer/hub/families/`, read in both
directions. Each row of the last column is a small random model that `pip install -e ".[parity]" &&
pytest -m parity` compares with transformers: hidden states and logits to 1e-4 in float32, on
ragged rows of up to 500 tokens padded right and left; greedy and beam-4 texts token for token;
tensors byte for byte when exported again, and the same logits when transformers reads them back.
Checkpoints in bfloat16 and float16 must give the same parameters as in float32, rounded.

| family | `model_type` | classes | what is of it | compared |
|---|---|---|---|---|
"""
FOOTER = """
Llama-type GGUF files (`llama`, `qwen2`, `qwen3`; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and
llama.cpp's fallbacks) load as their families do. `jaxformer.load_torch` reads a
`torch.nn.Transformer` from a file of `torch.save`, of which nothing is executed.
sentence-transformers' directories of BERT types bring their pooling along.

Not read: other rope scalings than linear, llama3 and LongRoPE within the original context;
OPT-350m; encoder-decoders whose sides differ in width or heads; token types other than the first
(pairs of texts); the second head of BertForPreTraining, and poolers that no head uses.

generation_config.json is followed, and written: greedy search, beams with their length penalty and
early_stopping, and sampling; temperature, top-k, top-p, min-p, typical, epsilon and eta cutoffs;
repetition penalty, n-gram blocks, bad words, biases of single tokens, exponential length decay;
lengths, suppressed and forced tokens. Over 200 random settings of them, ragged prompts and 4 beams
are compared with transformers' `generate` in the same way: all tokens, the order of all beams, and
scores to 1e-4. Not followed: biases of sequences of tokens, and a penalty of what the encoder read;
forced_bos_token_id holds for every prompt, where transformers forgets it after one of two tokens.
"""


def table() -> str:
    """The page, as Markdown."""
    rows = []
    for kind, family in FAMILIES.items():
        compared = [each.name for each in CHECKPOINTS if each.model_type == kind]
        classes = ", ".join(f"`{name}`" for name in family.architectures)
        about, names = family.about or "&nbsp;", "; ".join(compared)
        rows.append(f"| {family.name} | `{kind}` | {classes} | {about} | {names} |\n")
    return HEADER + "".join(rows) + FOOTER


if __name__ == "__main__":
    print(table(), end="")
