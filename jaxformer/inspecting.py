"""What a run directory, Hugging Face directory or GGUF file says of itself: no weights, no jax."""

import dataclasses
from pathlib import Path

from jaxformer import run
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.data.foreign import from_files
from jaxformer.data.foreign import read_tokenizer as read_foreign
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import CheckpointError
from jaxformer.hub import folder


def read_config(path: str | Path) -> ModelConfig:
    """The architecture of a run directory, Hugging Face directory or GGUF file, as `TrainConfig`
    takes it to fine-tune that with `init_from`.

    Parameters are in float32, or in what the run has. Raises `CheckpointError`.
    """
    if run.exists(Path(path)):  # adapters are merged when it is loaded
        return dataclasses.replace(run.read(Path(path))[0].model, lora_rank=0)
    return open_folder(path).config


def read_decode(path: str | Path) -> DecodeConfig:
    """How the model there generates unless told otherwise; arguments and errors as `read_config`'s.

    Some need it: mBART writes a language first, Marian never its padding.
    """
    if run.exists(Path(path)):
        return run.read(Path(path))[0].decode
    return open_folder(path).decode


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer there; raises `DataError` if it is missing or damaged."""
    if run.exists(Path(path)):
        return run.read(Path(path))[1]
    return folder_tokenizer(open_folder(path), Path(path))


def open_folder(path: str | Path) -> folder.Folder:
    """A checkpoint of another library, none of whose tensors has been read yet."""
    if not folder.is_checkpoint(Path(path)):
        raise CheckpointError(
            f"{path} is no run directory (it has no {run.VERSIONS}), no Hugging Face directory (it "
            f"has no {folder.CONFIG}) and no {folder.GGUF} file; give the run_dir of a training "
            "run, or what was downloaded."
        )
    return folder.open_checkpoint(Path(path))


def folder_tokenizer(found: folder.Folder, path: Path) -> Tokenizer:
    """The tokenizer of such a checkpoint."""
    if found.tokenizer_files:
        return from_files(found.tokenizer_files, found.theirs, found.generation)
    return read_foreign(path, found.theirs, found.generation)
