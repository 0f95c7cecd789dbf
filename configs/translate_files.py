r"""python train.py --config configs/translate_files.py \
    --data.train train.en train.de --data.valid valid.en valid.de

Translate with any two parallel text files: line i of one is the translation of line i. A
SentencePiece tokenizer for both languages is trained on the way.
"""

from jaxformer import DataConfig, DecodeConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    """A small encoder-decoder, which ten minutes on two CPU cores begin to train."""
    return TrainConfig(
        run_dir="runs/translate",
        steps=1500,
        eval_every=500,
        save_every=500,
        metrics=("bleu", "chrf"),
        eval_examples=200,
        model=ModelConfig(
            n_encoder_layers=2,
            n_decoder_layers=2,
            d_model=128,
            d_ff=512,
            n_heads=4,
            max_length=256,
            norm="rms",
            activation="relu",
            scan_layers=False,
        ),
        data=DataConfig(
            source="parallel",
            task="seq2seq",
            tokenizer="sentencepiece",
            vocab_size=4000,
            buckets=(16, 24, 48),
            batch_tokens=3072,
        ),
        optim=OptimConfig(learning_rate=4e-3, schedule="linear", warmup=200, label_smoothing=0.1),
        decode=DecodeConfig(beams=4, batch_size=128, max_length=64),
    )
