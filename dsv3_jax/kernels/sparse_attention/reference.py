"""The oracle: every index score, every attention score."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import Sparse
from dsv3_jax.ops.attention import attention_weights, reference_attention
from dsv3_jax.ops.indexing import Index, index_loss, index_scores
from dsv3_jax.ops.patterns import Place, best_keys, visible


def indexed_attention(
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array,
    index: Index,
    q_place: Place,
    k_place: Place,
    pattern: Sparse,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.sparse_attention`. Memory B · H · T · S."""
    mask_BTS, _ = visible(pattern, q_place, k_place, causal=causal)
    scores_BTS = index_scores(index)
    if pattern.stage == "sparse":
        mask_BTS &= best_keys(jnp.where(mask_BTS, scores_BTS, -jnp.inf), pattern.top_k)
    out_BTHM, lse_BHT = reference_attention(q_BTHN, k_BSGN, v_BSGM, mask_BTS, scale, softcap=softcap)
    weights_BHTS = attention_weights(q_BTHN, k_BSGN, mask_BTS, scale, lse_BHT, softcap)
    return out_BTHM, lse_BHT, index_loss(scores_BTS, jnp.mean(weights_BHTS, axis=1), mask_BTS)
