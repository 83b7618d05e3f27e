"""No experts: dense MLPs in all layers, as many FLOPs a token.

.venv/bin/python experiments/train.py --config=configs/moe/dense.py --workdir=/tmp/dense
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/moe/published_v3.py` without experts."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "published_v3.py")).get_config()
    model = replace(base.model, moe=None, num_dense_layers=base.model.num_layers, dense_dim=345)
    return replace(base, model=model)
