"""The oracle: the whole mask of the pattern, then reference attention."""

import jax

from dsv3_jax.config import Pattern
from dsv3_jax.ops.attention import reference_attention
from dsv3_jax.ops.patterns import visible


def pattern_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    pattern: Pattern,
    scale: float,
    max_segments: int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`. Quadratic in T; knows no bound on documents a row."""
    del max_segments
    return reference_attention(q_BTHN, k_BTGN, v_BTGM, visible(pattern, positions_BT, segment_ids_BT), scale)
