"""Tokamax's ragged_dot, by its own kernels."""

import jax
import tokamax


def matmul(x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x_ND sorted by group, group sizes [E] -> [N, F]. Raises where tokamax has no kernel of its own."""
    kernels = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("mosaic",)
    return tokamax.ragged_dot(x_ND, w_EDF, group_sizes_E, preferred_element_type=x_ND.dtype, implementation=kernels)
