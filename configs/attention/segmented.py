"""Segments of 128 tokens that see only themselves.

.venv/bin/python experiments/train.py --config=configs/attention/segmented.py --workdir=/tmp/segmented
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with segment-local attention."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Segmented(128)
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
