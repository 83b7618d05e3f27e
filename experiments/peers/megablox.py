"""Megablox, the Pallas grouped matmul for TPUs that comes with JAX."""

import jax
from jax.experimental.pallas.ops.tpu.megablox import gmm

TILES = (512, 1024, 1024)  # rows, summed over, columns; its default of 128 each is for the smallest products


def matmul(x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """x_ND sorted by group, group sizes [E] -> [N, F]."""
    tiles = tuple(min(tile, size) for tile, size in zip(TILES, (len(x_ND), *w_EDF.shape[1:]), strict=True))
    return gmm(x_ND, w_EDF, group_sizes_E, x_ND.dtype, tiles, None, None, False, interpret)
