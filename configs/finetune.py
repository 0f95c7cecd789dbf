"""Fine-tune a downloaded model, or a run, on files of your own.

    BASE=path/to/flan-t5-small python train.py --config configs/finetune.py \
        --data.train questions.txt answers.txt

BASE is a Hugging Face directory, a GGUF file, or the run_dir of a training run. An encoder-decoder
learns from two files, line by line; a decoder or an encoder from one, each line an example.
`--model.lora_rank 8` trains low-rank adapters alone. What the run comes to,
`jaxformer convert runs/finetune DIR` writes as a Hugging Face directory again.
"""

import os

from jaxformer import DataConfig, OptimConfig, TrainConfig, read_config, read_decode
from jaxformer.errors import ConfigError


def get_config() -> TrainConfig:
    """The model, its tokenizer and its way to generate are the base's; the rest is stated here."""
    base = os.environ.get("BASE", "")
    if not base:
        raise ConfigError("BASE names no model; begin the command with BASE=path/to/model.")
    model = read_config(base)
    longest = min(128, model.max_length)
    return TrainConfig(
        run_dir="runs/finetune",
        init_from=base,
        steps=1000,
        eval_every=250,
        save_every=250,
        model=model,
        data=DataConfig(
            source="parallel" if model.kind == "encoder-decoder" else "text",
            task=model.task,
            lines=True,
            buckets=(longest // 4, longest // 2, longest),
            batch_tokens=16 * longest,
        ),
        optim=OptimConfig(learning_rate=1e-4, schedule="linear", warmup=50, beta2=0.999, eps=1e-8),
        decode=read_decode(base),
    )
