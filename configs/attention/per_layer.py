"""Patterns by layer: two layers with a window of 128, then one that sees everything.

.venv/bin/python experiments/train.py --config=configs/attention/per_layer.py --workdir=/tmp/per_layer
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with windows and full attention in turn."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.PerLayer((c.Windowed(128), c.Windowed(128), c.Full()))
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
