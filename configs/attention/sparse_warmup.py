"""DeepSeek sparse attention, first stage: attention stays dense, the indexer alone is trained to predict it.

Start it from a trained dense model (`configs/tiny.py` in /tmp/tiny):

    .venv/bin/python experiments/train.py --config=configs/attention/sparse_warmup.py --workdir=/tmp/sparse_warmup \\
        --init_from=/tmp/tiny

Without --init_from the indexer learns to predict a random model:

.venv/bin/python experiments/train.py --config=configs/attention/sparse_warmup.py --workdir=/tmp/sparse_warmup
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with an indexer, everything else frozen."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    pattern = c.Sparse(top_k=128, index_heads=8, index_dim=32, stage="warmup")
    model = replace(base.model, attention=replace(base.model.attention, pattern=pattern))
    return replace(base, model=model, train=replace(base.train, trainable=("indexer",)))
