"""Overlapping windows and global tokens: windows of 128 that begin every 64, the first token and three more global.

Under causality a middle or last token is not known in advance: `tests/kernels/test_windowed_attention.py` runs those
(`global_fractions`) in the bidirectional form.

.venv/bin/python experiments/train.py --config=configs/attention/overlapping_global.py --workdir=/tmp/overlapping_global
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with overlapping windows and global positions."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Windowed(128, stride=64, global_positions=(0, 1, 256, 512))
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
