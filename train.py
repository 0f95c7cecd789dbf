"""Train a Transformer: `python train.py --config configs/X.py --any.field value`.

Without a config it trains the quick one, configs/g2p_cmudict.py. The run directory holds all that
comes of it, and the same command goes on where a run was stopped.
"""

import sys
from pathlib import Path

from jaxformer.cli import main

if __name__ == "__main__":
    options = sys.argv[1:]
    if not any(option.split("=")[0] == "--config" for option in options):
        options = ["--config", str(Path(__file__).parent / "configs" / "g2p_cmudict.py"), *options]
    sys.exit(main(["train", *options]))
