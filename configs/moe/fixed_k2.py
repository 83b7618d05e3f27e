"""Two of 16 experts a token, each wider, so that the cost is that of four.

.venv/bin/python experiments/train.py --config=configs/moe/fixed_k2.py --workdir=/tmp/fixed_k2
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with a softmax router and experts of 107 units."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.Softmax(top_k=2, balance_weight=1e-2, z_weight=1e-3)
    moe = replace(base.model.moe, expert_dim=107, router=router)
    return replace(base, model=replace(base.model, moe=moe))
