"""Full attention with learned sinks, scores capped at 30, and positions of YaRN: 4 times the length it was made for.

.venv/bin/python experiments/train.py --config=configs/attention/soft_capped_sinks.py --workdir=/tmp/soft_capped_sinks
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with sinks, soft-capping and YaRN."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    attention = replace(
        base.model.attention, sinks=True, softcap=30.0, rope_scaling=c.Yarn(factor=4.0, original_length=256)
    )
    return replace(base, model=replace(base.model, attention=attention))
