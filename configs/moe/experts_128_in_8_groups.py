"""128 experts in 8 groups of 16, two a token, chosen by the token and its task; no shared expert.

.venv/bin/python experiments/train.py --config=configs/moe/experts_128_in_8_groups.py --workdir=/tmp/experts_128
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with those experts, of 139 units."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.Softmax(top_k=2, num_groups=8, top_groups=2, balance_weight=1e-2)
    moe = replace(
        base.model.moe,
        num_experts=128,
        expert_dim=139,
        num_shared_experts=0,
        router=router,
        condition=c.Condition(tasks=("prose", "code")),
    )
    return replace(base, model=replace(base.model, moe=moe))
