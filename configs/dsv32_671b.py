"""The published DeepSeek-V3.2-Exp: DeepSeek-V3 with sparse attention, its context extended to 160K by YaRN
(`config.json` of the released checkpoint), multi-token prediction included. Checked by `eval_shape`; it needs a cluster
to run.

    .venv/bin/python -c "from dsv3_jax.config import load; from dsv3_jax.planning.flops import count_parameters; \
print(count_parameters(load('configs/dsv32_671b.py').model))"
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """An indexer of 64 heads of 128 picks 2048 keys a query; rotations interpolated 40 times beyond 4096."""
    base = c.load_module(str(pathlib.Path(__file__).parent / "dsv3_671b.py")).get_config()
    attention = replace(
        base.model.attention,
        pattern=c.Sparse(top_k=2048, index_heads=64, index_dim=128),
        rope_scaling=c.Yarn(factor=40.0, original_length=4096),
    )
    model = replace(base.model, attention=attention, context_length=163_840)
    return replace(base, model=model, data=replace(base.data, sequence_length=131_072))
