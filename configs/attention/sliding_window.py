"""Sliding window of 128: each token sees itself and the 127 before it.

.venv/bin/python experiments/train.py --config=configs/attention/sliding_window.py --workdir=/tmp/sliding_window
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with a sliding window."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Windowed(128)
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
