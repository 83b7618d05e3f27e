"""8 experts that become 16, 32 and 64 while training: at steps 40, 70 and 100 of 150.

A new expert is a copy of an old one that no token chooses yet: the language-model loss and its gradients go on where
they were, and so does the value of the balance loss, whose gradient sees the new experts at once. Over 20 steps the
selection bias of a new one rises to that of its parent. `router/active_experts` of metrics.jsonl counts them.

.venv/bin/python experiments/train.py --config=configs/moe/expansion.py --workdir=/tmp/expansion
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with 64 experts in the end: as many FLOPs a token, but for the router."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, num_experts=64)
    growth = c.Expansion(initial_experts=8, steps=(40, 70, 100), ramp_steps=20)
    return replace(base, model=replace(base.model, moe=moe), train=replace(base.train, growth=growth))
