"""Picks an implementation of attention by pattern."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError, Pattern
from dsv3_jax.kernels.windowed_attention.blocked import blocked_attention
from dsv3_jax.kernels.windowed_attention.reference import pattern_attention

IMPLEMENTATIONS = {"blocked": blocked_attention, "reference": pattern_attention}


def windowed_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    *,
    pattern: Pattern,
    scale: float,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    max_segments: int = 16,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention of a sequence to itself, through `pattern`.

    Args:
      positions_BT: positions within a document, rising by one from 0 in each. Default: 0 … T − 1.
      segment_ids_BT: the document of each token, 1, 2, 3 … along the row, 0 on padding. Default: one document.
      max_segments: the most documents a row may hold, where the pattern has global positions.
      implementation: "blocked" (default; plain JAX, skips blocks, memory linear in T · window) or "reference".

    Returns:
      out_BTHM in the dtype of `v`, and the log-sum-exp of each query's visible scores, lse_BHT float32. A query that
      sees nothing gives zeros and −inf; a document numbered above `max_segments` gives NaN, never a wrong result.

    Raises:
      ConfigError: an unknown implementation. ValueError: shapes that do not fit.
    """
    B, T, H, N = q_BTHN.shape
    if k_BTGN.shape[:2] != (B, T) or v_BTGM.shape[:3] != k_BTGN.shape[:3] or k_BTGN.shape[3] != N:
        raise ValueError(f"q {q_BTHN.shape}, k {k_BTGN.shape}, v {v_BTGM.shape}: batch, length, heads or width differ")
    if H % k_BTGN.shape[2]:
        raise ValueError(f"{H} query heads are not a multiple of {k_BTGN.shape[2]} key heads")
    name = implementation or "blocked"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.attention.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if (positions_BT is None) != (segment_ids_BT is None):
        raise ValueError("give both positions and segment ids, or neither: positions restart in each document")
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    attend = IMPLEMENTATIONS[name]
    return attend(q_BTHN, k_BTGN, v_BTGM, positions_BT, segment_ids_BT, pattern, scale, max_segments)
