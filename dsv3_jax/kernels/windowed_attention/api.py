"""Picks an implementation of attention by pattern."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError, LayerPattern, LearnedGlobal, RuntimeWindowed
from dsv3_jax.kernels.windowed_attention.blocked import blocked_attention
from dsv3_jax.kernels.windowed_attention.reference import pattern_attention
from dsv3_jax.ops.patterns import Place

IMPLEMENTATIONS = {"blocked": blocked_attention, "reference": pattern_attention}


def windowed_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    *,
    pattern: LayerPattern,
    scale: float,
    causal: bool = True,
    place: Place | None = None,
    gate_BT: jax.Array | None = None,
    softcap: float | None = None,
    max_segments: int = 16,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of a sequence to itself, through `pattern`.

    Args:
      place: positions within a document, rising by one from 0 in each; the document of each token, 1, 2, 3 … along the
        row, 0 on padding; and, for `RuntimeWindowed` alone, each query's window, at most the pattern's (None: the
        pattern's). Default: one document.
      gate_BT: float32, for `LearnedGlobal` alone: the score by which keys are chosen.
      softcap: see `ops.attention.soft_cap`.
      max_segments: the most documents a row may hold, where the pattern has one set of global keys for each.
      implementation: "blocked" (default; plain JAX, skips blocks, memory linear in T · window but for the choice of
        learned global keys) or "reference".

    Returns:
      out_BTHM in the dtype of `v`, and the log-sum-exp of each query's visible scores, lse_BHT float32. A query that
      sees nothing gives zeros and −inf; a document numbered above `max_segments` gives NaN, never a wrong result.

    Raises:
      ConfigError: an unknown implementation. ValueError: arguments that do not fit.
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
    if (gate_BT is not None) != isinstance(pattern, LearnedGlobal):
        raise ValueError(f"gate_BT belongs to learned_global and to it alone; the pattern is {pattern.kind}")
    if place is None:
        place = Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32))
    if place.window_BT is not None and not isinstance(pattern, RuntimeWindowed):
        place = place._replace(window_BT=None)  # of other layers
    attend = IMPLEMENTATIONS[name]
    return attend(q_BTHN, k_BTGN, v_BTGM, place, gate_BT, pattern, causal, scale, softcap, max_segments)
