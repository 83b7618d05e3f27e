"""Dense MLPs whose units a small gate switches on and off by token, 70 % on; wider, so that the cost is the same.

`activation/active_share` of metrics.jsonl is the share that is on.

.venv/bin/python experiments/train.py --config=configs/moe/dynamic_units.py --workdir=/tmp/dynamic_units
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/dense.py` with a unit gate."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "dense.py")).get_config()
    return replace(base, model=replace(base.model, dense_dim=480, unit_gate=c.UnitGate(target=0.7)))
