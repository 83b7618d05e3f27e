"""The published DeepSeek-V3 router, small: sigmoid scores, the best 2 of 4 groups, 4 of 16 experts, one shared expert.

The selection bias moves by 0.01 a step, ten times the published rate: a run here has a hundred steps, not a million.
The other files of this folder cost as much a token as this one (training FLOPs, `planning/flops.py`) unless they say
otherwise.

.venv/bin/python experiments/train.py --config=configs/moe/published_v3.py --workdir=/tmp/published_v3
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with 16 experts of 64 units in place of 8 of 128."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    router = c.GroupedSigmoid(top_k=4, num_groups=4, top_groups=2, balance_weight=1e-4, bias_update_rate=1e-2)
    moe = c.MixtureOfExperts(num_experts=16, expert_dim=64, num_shared_experts=1, router=router)
    return replace(base, model=replace(base.model, moe=moe))
