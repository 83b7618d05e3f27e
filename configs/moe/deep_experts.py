"""An expert is a stack of two Transformer layers: two of eight a token, no shared expert.

.venv/bin/python experiments/train.py --config=configs/moe/deep_experts.py --workdir=/tmp/deep_experts
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with such experts."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    router = c.Softmax(top_k=2, balance_weight=1e-2, z_weight=1e-3)
    expert = c.DeepExpert(num_layers=2, num_heads=2, head_dim=16)
    moe = replace(base.model.moe, num_experts=8, expert_dim=28, num_shared_experts=0, router=router, expert=expert)
    return replace(base, model=replace(base.model, moe=moe))
