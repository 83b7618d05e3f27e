"""Two to four of 16 experts, as many as a token needs to gather a probability mass; three on average.

`router/mean_k` of metrics.jsonl shows the mean that training holds.

.venv/bin/python experiments/train.py --config=configs/moe/per_token_k.py --workdir=/tmp/per_token_k
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with that router, and experts of 80 units."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.ProbabilityMass(k_min=2, k_max=4, target_k=3.0, balance_weight=1e-2, z_weight=1e-3)
    moe = replace(base.model.moe, expert_dim=80, router=router)
    return replace(base, model=replace(base.model, moe=moe))
