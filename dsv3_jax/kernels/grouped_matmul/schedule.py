"""Which tile of rows meets which group at each step of a grouped matmul; of no platform.

Rows are sorted by group and cut into tiles of `block` rows wherever groups begin. A step is a visit of one group to
one tile: a tile that several groups share is visited by each, a group of many rows visits several tiles in a row. The
number of steps is bounded by shapes alone, the steps themselves follow from the group sizes at run time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """tile_S, group_S: of each step, by group, then by tile. Steps past `count_1` repeat the last one.

    start_E1: the first row of each group, and the end of the last, [E + 1]. All int32.
    """

    tile_S: jax.Array
    group_S: jax.Array
    start_E1: jax.Array
    count_1: jax.Array


def max_steps(num_rows: int, num_groups: int, block: int, empty: bool) -> int:
    """An upper bound of `Schedule.count_1`: every tile once, and again wherever a group ends inside one."""
    visitors = num_groups if empty else min(num_groups, num_rows)
    return -(-num_rows // block) + visitors - 1


def make_schedule(sizes_E: jax.Array, num_rows: int, block: int, *, empty: bool) -> Schedule:
    """The steps for groups of these sizes, int32 [E], at most `num_rows` together; rows past them are of no group.

    Args:
      empty: whether an empty group has a step too, at which it sees no rows.
    """
    (E,), tiles = sizes_E.shape, -(-num_rows // block)
    end_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    start_E = end_E - sizes_E
    first_E = jnp.minimum(start_E // block, tiles - 1)
    visits_E = jnp.where(sizes_E > 0, (end_E - 1) // block - first_E + 1, int(empty))
    stop_E = jnp.cumsum(visits_E)
    count = stop_E[-1]
    step_S = jnp.minimum(jnp.arange(max_steps(num_rows, E, block, empty)), jnp.maximum(count - 1, 0))
    group_S = jnp.minimum(jnp.sum(step_S[:, None] >= stop_E, axis=1, dtype=jnp.int32), E - 1)
    tile_S = jnp.minimum((first_E + visits_E - stop_E)[group_S] + step_S, tiles - 1)
    start_E1 = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E])
    return Schedule(tile_S.astype(jnp.int32), group_S, start_E1, count[None])
