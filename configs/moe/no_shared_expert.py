"""Without a shared expert; the routed ones are wider by its share.

.venv/bin/python experiments/train.py --config=configs/moe/no_shared_expert.py --workdir=/tmp/no_shared_expert
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with 16 experts of 80 units alone."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, expert_dim=80, num_shared_experts=0)
    return replace(base, model=replace(base.model, moe=moe))
