"""An expert takes at most 1.25 times its even share of a row; what is beyond is dropped, and counted.

`router/dropped` of metrics.jsonl is the share of assignments that found no room.

.venv/bin/python experiments/train.py --config=configs/moe/capacity.py --workdir=/tmp/capacity
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` with capacity dispatch."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    moe = replace(base.model.moe, dispatch=c.CapacityDispatch(1.25))
    return replace(base, model=replace(base.model, moe=moe))
