"""python train.py --config configs/g2p_cmudict.py

Pronounce English words: letters to phones, learned from the CMU dictionary. This is what a plain
`python train.py` trains.
"""

from jaxformer import DataConfig, DecodeConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    """The quick default: an encoder-decoder of a million parameters."""
    return TrainConfig(
        run_dir="runs/g2p",
        steps=900,
        eval_every=450,
        save_every=450,
        metrics=("wer", "per"),
        model=ModelConfig(
            n_encoder_layers=2,
            n_decoder_layers=2,
            d_model=128,
            d_ff=512,
            n_heads=4,
            max_length=64,
            norm="rms",
            activation="relu",
            scan_layers=False,
        ),
        data=DataConfig(
            source="cmudict",
            task="seq2seq",
            spell=True,
            tokenizer="word",
            valid_fraction=0.05,
            pack=True,  # a batch has words of all lengths, and all batches one shape
            buckets=(32,),
            batch_tokens=3072,
        ),
        optim=OptimConfig(learning_rate=4e-3, schedule="linear", warmup=200),
        decode=DecodeConfig(beams=3, max_length=40, batch_size=512),
    )
