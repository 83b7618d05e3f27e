"""Rows of documents, and calls of attention by pattern, for tests."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.ops.patterns import Place


def place_of(*lengths: int, padding: int = 0) -> Place:
    """A row of documents, and padding after them."""
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding)])
    return Place(jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32))


def call_of(dtype: Any, key_width: int = 128, value_width: int = 128, **more: Any) -> Call:
    """Of four tokens and one head."""
    q, k, v = (jnp.ones((1, 4, 1, width), dtype) for width in (key_width, key_width, value_width))
    return Call(q, k, v, place_of(4), **({"pattern": c.Full(), "scale": 1.0, "max_segments": 1} | more))
