"""What every layer is told of a batch beside the hidden states."""

import dataclasses

import jax
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers.projections import rotated_width
from dsv3_jax.ops.patterns import Place
from dsv3_jax.ops.rope import RopeTable, rope_table


@struct.dataclass
class CacheStep:
    """What a call adds to a cache: length_B, the tokens of each row after it, and the cache's static sizes."""

    length_B: jax.Array
    max_length: int = struct.field(pytree_node=False)
    step: int = struct.field(pytree_node=False)
    fresh: bool = struct.field(pytree_node=False)


@struct.dataclass
class Packing:
    """Where the tokens of a batch stand (see `ops.patterns`), their rotations, and the cache that they go on from.

    condition_BTC: what routers know of a token beside itself, if they do. key_B: a random key a row, in training only;
    layers fold their index in.
    """

    place: Place
    rope: RopeTable
    max_segments: int = struct.field(pytree_node=False, default=16)
    cache_step: CacheStep | None = None
    condition_BTC: jax.Array | None = None
    key_B: jax.Array | None = None

    @property
    def token_mask_BT(self) -> jax.Array:
        """False on padding."""
        return self.place.segment_BT > 0

    def at_layer(self, layer: jax.Array | int) -> "Packing":
        """With keys of this layer."""
        if self.key_B is None:
            return self
        return dataclasses.replace(self, key_B=jax.vmap(jax.random.fold_in, (0, None))(self.key_B, layer))


def make_packing(
    config: ModelConfig, place: Place, max_segments: int = 16, cache_step: CacheStep | None = None
) -> Packing:
    """The packing of a batch, with the rotations that the config's projection needs."""
    attention = config.attention
    rope = rope_table(place.position_BT, rotated_width(attention), attention.rope_theta, attention.rope_scaling)
    return Packing(place, rope, max_segments, cache_step)
