"""DeepSeek sparse attention, second stage: each query sees the 128 keys that the indexer picks.

Go on from the warm-up with --init_from=/tmp/sparse_warmup.

.venv/bin/python experiments/train.py --config=configs/attention/sparse.py --workdir=/tmp/sparse
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with sparse attention."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Sparse(top_k=128, index_heads=8, index_dim=32)
    return replace(base, model=replace(base.model, attention=replace(base.model.attention, pattern=pattern)))
