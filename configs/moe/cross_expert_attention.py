"""The outputs of a token's experts attend to one another before they are summed.

.venv/bin/python experiments/train.py --config=configs/moe/cross_expert_attention.py --workdir=/tmp/cross_expert
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with that, and narrower experts."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    combination = c.CrossExpertAttention(num_heads=2, head_dim=8)
    moe = replace(base.model.moe, expert_dim=47, combination=combination)
    return replace(base, model=replace(base.model, moe=moe))
