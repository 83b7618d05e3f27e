"""Grouped matmul for CPU: groups padded to whole blocks, one batched matmul over the blocks.

Sizes are static: with blocks of the mean group's size there are at most 2 E of them, however unbalanced the groups, so
the work is at most about twice that of the rows; so are the copies of matrices, one a block. The gradients are JAX's
own.
"""

import jax
import jax.numpy as jnp


def padded_matmul(x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x_ND sorted by group, group sizes [E] -> [N, F]. Rows past the last group hold what means nothing."""
    N, (E, _, F) = len(x_ND), w_EDF.shape
    block = -(-N // E)
    num_blocks = (N + E * (block - 1)) // block  # Σ ceil(size / block) is at most this
    end_E = jnp.cumsum(group_sizes_E)
    end_block_E = jnp.cumsum(-(-group_sizes_E // block))
    # From a group's first place among the padded rows to its first row.
    back_E = (end_E - group_sizes_E) - (end_block_E + group_sizes_E // -block) * block

    expert_n = jnp.minimum(jnp.sum(jnp.arange(num_blocks)[:, None] >= end_block_E, axis=-1), E - 1)
    row_nb = jnp.arange(num_blocks * block).reshape(num_blocks, block) + back_E[expert_n, None]
    own_nb = row_nb < end_E[expert_n, None]
    x_nbD = jnp.where(own_nb[..., None], jnp.take(x_ND, row_nb, axis=0, mode="clip"), 0)
    # Taken in float32: the gradient adds up the blocks of a group, and bfloat16 would lose all but the first few.
    w_nDF = w_EDF.astype(jnp.float32)[expert_n].astype(w_EDF.dtype)
    y_nbF = jnp.einsum("nbD,nDF->nbF", x_nbD, w_nDF)

    expert_N = jnp.minimum(jnp.sum(jnp.arange(N)[:, None] >= end_E, axis=-1), E - 1)
    return jnp.take(y_nbF.reshape(-1, F), jnp.arange(N) - back_E[expert_N], axis=0, mode="clip")
