"""Disjoint windows of 64 and the 16 tokens before them that a learned gate scores best.

.venv/bin/python experiments/train.py --config=configs/attention/learned_global.py --workdir=/tmp/learned_global
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with learned global keys."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.LearnedGlobal(window=64, stride=64, top_k=16)
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
