"""What every implementation of attention by pattern takes."""

from typing import NamedTuple

import jax

from dsv3_jax.config import LayerPattern
from dsv3_jax.ops.patterns import Place


class Call(NamedTuple):
    """Attention of a sequence to itself, as `api.windowed_attention` takes it, with every argument set."""

    q_BTHN: jax.Array
    k_BTGN: jax.Array
    v_BTGM: jax.Array
    place: Place
    pattern: LayerPattern
    scale: float
    causal: bool = True
    gate_BT: jax.Array | None = None
    softcap: float | None = None
    max_segments: int = 16
