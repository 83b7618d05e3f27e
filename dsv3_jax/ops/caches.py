"""Caches of keys and values for decoding: explicit values, one interface for every projection × pattern.

The cache of a layer is a tuple of arrays [B, S, ...], one for each thing that later queries need of a token: keys and
values (grouped-query), the latent with the rotated key (latent attention), the gate's score (learned global keys), the
indexer's key (sparse attention). S slots are a *ring* of R, in which position p lies at p mod R, and one *pinned* slot
for each global position of a windowed pattern. Where nothing may be forgotten the ring is as long as the longest text.

What lies in a slot follows from how many tokens a row has seen. Rows may have different lengths, and a row can be
rolled back (`Cache.rollback`) by as many tokens as one call may add.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import LayerPattern
from dsv3_jax.ops.patterns import global_fractions, global_positions, reach

LayerCache = tuple[jax.Array, ...]


class CacheLayout(NamedTuple):
    """`ring` slots, then one slot for each of `pinned` positions."""

    ring: int
    pinned: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """S."""
        return self.ring + len(self.pinned)


@struct.dataclass
class Cache:
    """length_B: tokens each row has seen, int32. layers: one `LayerCache` a layer. `fresh` until the first call; `step`
    is the most tokens that a later call may add."""

    length_B: jax.Array
    layers: Any
    max_length: int = struct.field(pytree_node=False)
    step: int = struct.field(pytree_node=False)
    fresh: bool = struct.field(pytree_node=False, default=True)

    def rollback(self, length_B: jax.Array) -> "Cache":
        """Forgets what came after the first `length_B` tokens of each row; at most `step` tokens of the last call."""
        return dataclasses.replace(self, length_B=length_B)


def cache_layout(pattern: LayerPattern, max_length: int, step: int) -> CacheLayout:
    """The slots that a causal layer needs for texts of up to `max_length`, where a call adds at most `step` tokens."""
    bound = reach(pattern)
    has_choice = pattern.kind == "learned_global"  # of any earlier token
    if bound is None or has_choice or global_fractions(pattern) or bound + step >= max_length:
        return CacheLayout(max_length)
    return CacheLayout(bound + step, tuple(p for p in global_positions(pattern) if p < max_length))


def slot_positions(layout: CacheLayout, length_B: jax.Array) -> jax.Array:
    """The position of the token in each slot [B, S] after `length_B` tokens; −1 where there is none yet."""
    last_B1 = length_B[:, None] - 1
    position_BR = last_B1 - (last_B1 - jnp.arange(layout.ring)) % layout.ring
    pinned_P = jnp.asarray(layout.pinned, jnp.int32)
    pinned_BP = jnp.where(pinned_P <= last_B1, pinned_P, -1)
    return jnp.concatenate([jnp.maximum(position_BR, -1), pinned_BP], axis=1)


def _rows(x_BTX: jax.Array, index_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTX, index_BS.reshape(*index_BS.shape, *(1,) * (x_BTX.ndim - 2)), axis=1)


def fill(layout: CacheLayout, values_BTX: jax.Array, length_B: jax.Array) -> jax.Array:
    """A new cache [B, S, ...] of the first `length_B` tokens of each row; zeros in empty slots."""
    position_BS = slot_positions(layout, length_B)
    picked = _rows(values_BTX, jnp.maximum(position_BS, 0))
    empty = (position_BS < 0).reshape(*position_BS.shape, *(1,) * (picked.ndim - 2))
    return jnp.where(empty, 0, picked)


def write(layout: CacheLayout, cache_BSX: jax.Array, values_BTX: jax.Array, position_BT: jax.Array) -> jax.Array:
    """The cache with tokens at `position_BT` added, at most R of them; position −1 writes nothing."""
    rows_B1 = jnp.arange(position_BT.shape[0])[:, None]
    nowhere = layout.slots  # out of bounds: dropped
    slot_BT = jnp.where(position_BT < 0, nowhere, position_BT % layout.ring)
    values_BTX = values_BTX.astype(cache_BSX.dtype)
    cache_BSX = cache_BSX.at[rows_B1, slot_BT].set(values_BTX, mode="drop")
    for index, pinned in enumerate(layout.pinned):
        slot_BT = jnp.where(position_BT == pinned, layout.ring + index, nowhere)
        cache_BSX = cache_BSX.at[rows_B1, slot_BT].set(values_BTX, mode="drop")
    return cache_BSX
