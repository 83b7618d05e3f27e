"""Picks an implementation of sparse attention."""

import jax

from dsv3_jax.config import ConfigError, Sparse
from dsv3_jax.kernels.sparse_attention.chunked import chunked_attention
from dsv3_jax.kernels.sparse_attention.reference import indexed_attention
from dsv3_jax.ops.indexing import Index
from dsv3_jax.ops.patterns import Place

IMPLEMENTATIONS = {"chunked": chunked_attention, "reference": indexed_attention}


def sparse_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    index: Index,
    *,
    pattern: Sparse,
    scale: float,
    place: Place,
    causal: bool = True,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Grouped-query attention of a sequence to the keys that the indexer scores best (DeepSeek-V3.2, section 2.1).

    The choice is made on exact scores, the first of equals. Both implementations compute every score and mask: the
    indexer is quadratic by design, and gathering keys for each query would not be faster at training lengths.

    Args:
      implementation: "chunked" (default; 128 queries at a time) or "reference".

    Returns:
      out_BTHM in the dtype of `v`; the log-sum-exp of the picked scores, lse_BHT float32; and the indexer's loss of
      each query, float32 [B, T] (`ops.indexing.index_loss`). Nothing else sends gradients to the indexer.

    Raises:
      ConfigError: an unknown implementation.
    """
    name = implementation or "chunked"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.attention.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
            " with the sparse pattern"
        )
    attend = IMPLEMENTATIONS[name]
    return attend(q_BTHN, k_BTGN, v_BTGM, index, place, place, pattern, causal, scale, softcap)
