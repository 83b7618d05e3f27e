"""Reference attention: the whole score matrix, masked. The oracle of every kernel."""

import jax
import jax.numpy as jnp


def reference_attention(
    q_BTHN: jax.Array, k_BSGN: jax.Array, v_BSGM: jax.Array, mask_BTS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale · q kᵀ + mask) v, grouped-query: query head h reads key head h // (H / G).

    Args:
      mask_BTS: bool, True where the query sees the key.

    Returns:
      out_BTHM in the dtype of `v`, and the log-sum-exp of the scores lse_BHT (float32, or float64 if given that).
      A row that sees nothing gives zeros and −inf.
    """
    B, T, H, N = q_BTHN.shape
    G = k_BSGN.shape[2]
    accumulate = jnp.promote_types(q_BTHN.dtype, jnp.float32)
    q_BTGhN = q_BTHN.reshape(B, T, G, H // G, N)
    scores = scale * jnp.einsum("BTGhN,BSGN->BGhTS", q_BTGhN, k_BSGN, preferred_element_type=accumulate)
    scores = jnp.where(mask_BTS[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    exp = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
    total = jnp.sum(exp, axis=-1, keepdims=True)
    weights = exp / jnp.where(total > 0, total, 1)
    out = jnp.einsum("BGhTS,BSGM->BTGhM", weights, v_BSGM.astype(accumulate)).reshape(B, T, H, v_BSGM.shape[-1])
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)[..., 0].reshape(B, H, T)
    return out.astype(v_BSGM.dtype), lse
