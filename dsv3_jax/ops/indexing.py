"""DeepSeek sparse attention's indexer (DeepSeek-V3.2, section 2.1): scores of keys, the best of them, and its loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Index(NamedTuple):
    """The indexer's queries, keys and head weights; the weights hold every scale. I is the indexer's width."""

    q_BTHI: jax.Array
    k_BSI: jax.Array
    w_BTH: jax.Array


def index_scores(index: Index) -> jax.Array:
    """I_ts = Σ_h w_th · relu(q_th · k_s), float32 [B, T, S] (equation 1)."""
    product_BHTS = jnp.einsum("BTHI,BSI->BHTS", index.q_BTHI, index.k_BSI, preferred_element_type=jnp.float32)
    return jnp.einsum("BTH,BHTS->BTS", index.w_BTH.astype(jnp.float32), jax.nn.relu(product_BHTS))


def index_loss(scores_BTS: jax.Array, attention_BTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """KL(p ‖ softmax(I)) of each query over the keys it sees, in nats, float32 [B, T] (equations 3 and 4).

    Args:
      attention_BTS: attention averaged over heads, the target: it gets no gradient.
    """
    p = jax.lax.stop_gradient(jnp.where(mask_BTS, attention_BTS, 0))
    log_q = jax.nn.log_softmax(jnp.where(mask_BTS, scores_BTS, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0), axis=-1)
