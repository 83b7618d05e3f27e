"""Softmax scores with a load-balance and a z loss, no selection bias: 4 of 16 experts, one shared expert.

.venv/bin/python experiments/train.py --config=configs/moe/softmax_balance_z.py --workdir=/tmp/softmax_balance_z
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with another router."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.Softmax(top_k=4, balance_weight=1e-2, z_weight=1e-3)
    moe = replace(base.model.moe, router=router)
    return replace(base, model=replace(base.model, moe=moe))
