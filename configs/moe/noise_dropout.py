"""Noise on the logits that choose, and experts out of reach of a sequence one time in ten, in training.

.venv/bin/python experiments/train.py --config=configs/moe/noise_dropout.py --workdir=/tmp/noise_dropout
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with both."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, router_noise=0.3, expert_dropout=0.1)
    return replace(base, model=replace(base.model, moe=moe))
