"""Reference attention: the whole score matrix, masked. The oracle of every kernel, and what decoding runs."""

import jax
import jax.numpy as jnp


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(scores / cap), bounded by ±cap (Gemma 2, arXiv:2408.00118, section 2); None changes nothing."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def reference_attention(
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    bias_BTS: jax.Array | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(softcap(scale · q kᵀ) + bias + mask) v, grouped-query: query head h reads key head h // (H / G).

    Args:
      mask_BTS: bool, True where the query sees the key.

    Returns:
      out_BTHM in the dtype of `v`, and the log-sum-exp of the scores lse_BHT (float32, or float64 if given that).
      A row that sees nothing gives zeros and −inf.
    """
    (B, T, H, _), accumulate = q_BTHN.shape, jnp.promote_types(q_BTHN.dtype, jnp.float32)
    scores = _scores(q_BTHN, k_BSGN, mask_BTS, scale, bias_BTS, softcap)
    # The peak cancels in the result. Its own gradient would compare scores with their maximum, and those may be rounded
    # differently when a compiler computes them twice: 0 / 0.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    exp = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
    total = jnp.sum(exp, axis=-1, keepdims=True)
    weights = (exp / jnp.where(total > 0, total, 1)).astype(v_BSGM.dtype)
    out = jnp.einsum("BGhTS,BSGM->BTGhM", weights, v_BSGM, preferred_element_type=accumulate)
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)[..., 0].reshape(B, H, T)
    return out.reshape(B, T, H, v_BSGM.shape[-1]).astype(v_BSGM.dtype), lse


def _scores(q_BTHN, k_BSGN, mask_BTS, scale: float, bias_BTS, softcap: float | None) -> jax.Array:
    """[B, G, H / G, T, S], −inf where masked."""
    (B, T, H, N), G = q_BTHN.shape, k_BSGN.shape[2]
    q_BTGhN = q_BTHN.reshape(B, T, G, H // G, N)
    accumulate = jnp.promote_types(q_BTHN.dtype, jnp.float32)
    scores = scale * jnp.einsum("BTGhN,BSGN->BGhTS", q_BTGhN, k_BSGN, preferred_element_type=accumulate)
    scores = soft_cap(scores, softcap)
    if bias_BTS is not None:
        scores += bias_BTS[:, None, None]
    return jnp.where(mask_BTS[:, None, None], scores, -jnp.inf)


def attention_weights(
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    lse_BHT: jax.Array,
    softcap: float | None = None,
    bias_BTS: jax.Array | None = None,
) -> jax.Array:
    """exp(scores − lse) [B, H, T, S]: the weights of the attention whose log-sum-exp is given; zeros for lse −inf."""
    scores = _scores(q_BTHN, k_BSGN, mask_BTS, scale, bias_BTS, softcap)
    scores_BHTS = scores.reshape(*lse_BHT.shape, -1)
    return jnp.exp(scores_BHTS - jnp.where(jnp.isfinite(lse_BHT), lse_BHT, 0)[..., None])


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to two disjoint key sets from (out_BTHM, lse_BHT) of each: out is weighted by exp(lse)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    # A query that sees nothing of either has −inf twice, whose difference is NaN.
    some = jnp.isfinite(lse_a) | jnp.isfinite(lse_b)
    lse_a, lse_b = (jnp.where(some, lse, 0) for lse in (lse_a, lse_b))
    share_BTH1 = jnp.swapaxes(jax.nn.sigmoid(lse_a - lse_b), 1, 2)[..., None]
    out = (out_a * share_BTH1 + out_b * (1 - share_BTH1)).astype(out_a.dtype)
    return out, jnp.where(some, jnp.logaddexp(lse_a, lse_b), -jnp.inf)


def add_sink(out_BTHM: jax.Array, lse_BHT: jax.Array, sink_H: jax.Array) -> jax.Array:
    """Attention with one more score a head that has no value, added after all key sets are merged (gpt-oss, 2025).

    exp(lse) / (exp(lse) + exp(sink)) of `out`.
    """
    share_BTH = jax.nn.sigmoid(jnp.swapaxes(lse_BHT, 1, 2) - sink_H)
    return (out_BTHM * share_BTH[..., None]).astype(out_BTHM.dtype)
