"""Experts of four widths, 32 to 80 units, and a shared expert of 80.

.venv/bin/python experiments/train.py --config=configs/moe/widths.py --workdir=/tmp/widths
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with experts of different widths."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, expert_dim=80, expert=c.FeedForward(widths=(32, 56, 72, 80)))
    return replace(base, model=replace(base.model, moe=moe))
