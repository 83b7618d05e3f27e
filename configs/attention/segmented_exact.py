"""Segments of 128 queries over all keys: the result of full attention, a segment's memory.

.venv/bin/python experiments/train.py --config=configs/attention/segmented_exact.py --workdir=/tmp/segmented_exact
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with exact segmented attention."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Segmented(128, keys="all")
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
