"""python train.py --config configs/mlm_words.py

An encoder that fills in masked pieces of words, learned from the standard library's docstrings.
"""

from jaxformer import DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    """A small encoder-only model with BERT's objective."""
    return TrainConfig(
        run_dir="runs/mlm_words",
        steps=1000,
        eval_every=250,
        save_every=500,
        model=ModelConfig(
            n_encoder_layers=4,
            d_model=128,
            d_ff=512,
            n_heads=4,
            max_length=128,
            norm="rms",
            activation="relu",
            scan_layers=False,
        ),
        data=DataConfig(
            source="docstrings",
            task="mlm",
            tokenizer="sentencepiece",
            vocab_size=2000,
            buckets=(32, 128),
            batch_tokens=4096,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup=100),
    )
