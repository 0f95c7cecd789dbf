"""Train, fine-tune and run Transformers in JAX.

    model = jaxformer.load("runs/g2p")
    model.generate(["transformer"])

Importing this touches no device, and loads jax only when a name that needs it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxformer.config import DataConfig as DataConfig
    from jaxformer.config import DecodeConfig as DecodeConfig
    from jaxformer.config import MeshConfig as MeshConfig
    from jaxformer.config import ModelConfig as ModelConfig
    from jaxformer.config import OptimConfig as OptimConfig
    from jaxformer.config import TrainConfig as TrainConfig
    from jaxformer.converting import convert as convert
    from jaxformer.converting import export as export
    from jaxformer.converting import save as save
    from jaxformer.inspecting import read_config as read_config
    from jaxformer.inspecting import read_decode as read_decode
    from jaxformer.loading import load as load
    from jaxformer.loading import load_torch as load_torch
    from jaxformer.loading import load_weights as load_weights
    from jaxformer.model import Model as Model
    from jaxformer.nn.transformer import Transformer as Transformer
    from jaxformer.presets import PRESETS as PRESETS
    from jaxformer.training.loop import fit as fit
    from jaxformer.types import Batch as Batch
    from jaxformer.types import Tokens as Tokens

_HOME = {
    "DataConfig": "config",
    "DecodeConfig": "config",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "TrainConfig": "config",
    "convert": "converting",
    "export": "converting",
    "save": "converting",
    "read_config": "inspecting",
    "read_decode": "inspecting",
    "load": "loading",
    "load_torch": "loading",
    "load_weights": "loading",
    "Model": "model",
    "Transformer": "nn.transformer",
    "PRESETS": "presets",
    "fit": "training.loop",
    "Batch": "types",
    "Tokens": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxformer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
