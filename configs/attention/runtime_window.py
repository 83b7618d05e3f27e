"""A window that the task sets at run time: 64 for prose, 256 for code, in one compiled program.

A task is a domain of the data here, and `--task` of experiments/generate.py.

.venv/bin/python experiments/train.py --config=configs/attention/runtime_window.py --workdir=/tmp/runtime_window
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with a window for each domain."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.RuntimeWindowed(
        window=256, global_positions=(0,), tasks=(c.TaskWindow("prose", 64), c.TaskWindow("code", 256))
    )
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
