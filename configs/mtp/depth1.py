"""One module that predicts the token after the next one, as in the published model (arXiv:2412.19437, section 2.2).

.venv/bin/python experiments/train.py --config=configs/mtp/depth1.py --workdir=/tmp/mtp_depth1
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with multi-token prediction of depth 1, which weighs 0.3, then 0.1 as published."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    late = base.train.num_steps * 2 // 3
    return replace(base, model=replace(base.model, mtp=c.MultiToken(depth=1, late_step=late)))
