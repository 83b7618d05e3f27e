"""The oracle, and what runs without an accelerator: the whole score matrix, which is small for a few queries."""

import jax
import jax.numpy as jnp

from dsv3_jax.ops.attention import reference_attention


def whole_attention(
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array | int,
    bias_BTS: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`."""
    values = k_BSGN[..., :v_BSGM] if isinstance(v_BSGM, int) else v_BSGM
    mask_BTS = bias_BTS > -jnp.inf
    return reference_attention(q_BTHN, k_BSGN, values, mask_BTS, scale, jnp.where(mask_BTS, bias_BTS, 0), softcap)
