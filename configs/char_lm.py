"""python train.py --config configs/char_lm.py --data.source text --data.train FILE

A character language model of any text file; without one it learns from the docstrings of Python's
standard library.
"""

from jaxformer import DataConfig, DecodeConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    """A small decoder-only model: 4 layers, 4 heads, 128 wide, 64 characters of context."""
    return TrainConfig(
        run_dir="runs/char_lm",
        steps=2000,
        eval_every=500,
        save_every=500,
        model=ModelConfig(
            n_decoder_layers=4,
            d_model=128,
            d_ff=512,
            n_heads=4,
            max_length=256,
            norm="rms",
            activation="relu",
            scan_layers=False,
        ),
        data=DataConfig(
            source="docstrings",
            task="lm",
            tokenizer="char",
            valid_fraction=0.1,
            buckets=(64,),
            batch_tokens=12 * 64,
        ),
        optim=OptimConfig(learning_rate=3e-3, schedule="cosine", warmup=100, beta2=0.99),
        decode=DecodeConfig(temperature=0.8, max_length=100),
    )
