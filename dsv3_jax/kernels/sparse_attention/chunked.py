"""The reference a chunk of queries at a time, and again in the backward pass: memory B · H · chunk · S."""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.config import Sparse
from dsv3_jax.kernels.sparse_attention.reference import indexed_attention
from dsv3_jax.ops.indexing import Index
from dsv3_jax.ops.patterns import Place

CHUNK = 128


def chunked_attention(
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
    """See `api.sparse_attention`."""
    T = q_BTHN.shape[1]
    chunk = min(CHUNK, T)

    def cut(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x_BT.ndim - 2))  # segment 0 is padding
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # inside a loop
    def rows(queries):
        q, index_q, index_w, place = queries
        part = Index(index_q, index.k_BSI, index_w)
        out, lse_BHT, loss = indexed_attention(q, k_BSGN, v_BSGM, part, place, k_place, pattern, causal, scale, softcap)
        return out, jnp.swapaxes(lse_BHT, 1, 2), loss

    queries = jax.tree.map(cut, (q_BTHN, index.q_BTHI, index.w_BTH, q_place))
    results = jax.lax.map(rows, queries)
    out, lse, loss = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T] for x in results)
    return out, jnp.swapaxes(lse, 1, 2), loss
