"""The oracle: each row is multiplied by its own copy of its group's matrix."""

import jax
import jax.numpy as jnp


def reference_matmul(x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x_ND sorted by group, group sizes [E] -> [N, F]. Memory N · D · F; sums in float32, the gradients' too."""
    group_N = jnp.repeat(jnp.arange(w_EDF.shape[0]), group_sizes_E, total_repeat_length=x_ND.shape[0])
    w_NDF = jnp.take(w_EDF.astype(jnp.float32), group_N, axis=0)
    return jnp.einsum("ND,NDF->NF", x_ND.astype(jnp.float32), w_NDF).astype(x_ND.dtype)
