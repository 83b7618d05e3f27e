"""Two of eight wide experts by softmax, with a load-balance and a z loss; no shared expert.

.venv/bin/python experiments/train.py --config=configs/moe/top2_of_8.py --workdir=/tmp/top2_of_8
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with 8 experts of 161 units."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.Softmax(top_k=2, balance_weight=1e-2, z_weight=1e-3)
    moe = replace(base.model.moe, num_experts=8, expert_dim=161, num_shared_experts=0, router=router)
    return replace(base, model=replace(base.model, moe=moe))
