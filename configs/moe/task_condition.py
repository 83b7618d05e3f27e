"""The router also sees the task of a token: in training its domain, in generation `--task`.

.venv/bin/python experiments/train.py --config=configs/moe/task_condition.py --workdir=/tmp/task_condition
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with a condition."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, condition=c.Condition(tasks=("prose", "code")))
    return replace(base, model=replace(base.model, moe=moe))
