"""The oracle: the whole mask of the pattern, then reference attention."""

import jax

from dsv3_jax.config import LayerPattern
from dsv3_jax.ops.attention import reference_attention
from dsv3_jax.ops.patterns import Place, visible


def pattern_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    place: Place,
    gate_BT: jax.Array | None,
    pattern: LayerPattern,
    causal: bool,
    scale: float,
    softcap: float | None,
    max_segments: int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`. Quadratic in T; knows no bound on documents a row."""
    del max_segments
    mask_BTS, bias_BTS = visible(pattern, place, place, causal=causal, gate_BS=gate_BT)
    return reference_attention(q_BTHN, k_BTGN, v_BTGM, mask_BTS, scale, bias_BTS, softcap)
