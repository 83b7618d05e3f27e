"""Attention = projection × pattern, of a whole sequence to itself or of new tokens to a cache."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import LayerPattern, LearnedGlobal, ModelConfig, Sparse
from dsv3_jax.kernels.decode_attention import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from dsv3_jax.kernels.decode_attention import decode_attention
from dsv3_jax.kernels.sparse_attention import sparse_attention
from dsv3_jax.kernels.windowed_attention import windowed_attention
from dsv3_jax.layers.common import parameter, weight
from dsv3_jax.layers.indexer import Gate, Indexer
from dsv3_jax.layers.inputs import CacheStep, Packing
from dsv3_jax.layers.projections import Heads, make_projection, softmax_scale, stored_keys_values
from dsv3_jax.ops.attention import add_sink
from dsv3_jax.ops.caches import LayerCache, cache_layout, fill, slot_positions, write
from dsv3_jax.ops.indexing import Index, index_scores
from dsv3_jax.ops.patterns import Place, local_mask, visible
from dsv3_jax.sharding import constrain


class Attention(nn.Module):
    """Projection, attention through the pattern, output projection.

    Returns out_BTD; the sums of the loss terms of this layer's learned parts; and the new cache, if one was given.
    """

    config: ModelConfig
    pattern: LayerPattern

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, packing: Packing, cache: LayerCache | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array], LayerCache | None]:
        config, pattern, step = self.config, self.pattern, packing.cache_step
        extend = step is not None and not step.fresh
        heads: Heads = make_projection(config, name="projection")(x_BTD, packing.rope, absorbed=extend)
        learned = gate_BT = index = None
        if isinstance(pattern, LearnedGlobal):
            learned = gate_BT = Gate(config, name="gate")(x_BTD)
        if isinstance(pattern, Sparse):
            index = Indexer(config, pattern, name="indexer")(x_BTD, heads.query_input_BTQ, packing.rope)
            learned = index.k_BSI
        stored = (*heads.stored, *(() if learned is None else (learned,)))
        losses: dict[str, jax.Array] = {}
        if step is not None and extend:
            assert cache is not None
            cache = self._write(cache, stored, packing.place, step)
            out_BTHM, lse_BHT = self._attend_cache(heads, index, cache, packing.place, step)
        else:
            out_BTHM, lse_BHT, losses = self._attend_self(heads, gate_BT, index, packing)
            if step is not None:
                layout = cache_layout(pattern, step.max_length, step.step)
                cache = tuple(fill(layout, x, step.length_B) for x in stored)
        if config.attention.sinks:
            sink_H = parameter(self, "sinks", nn.initializers.zeros, (out_BTHM.shape[2],), (axes.HEADS,))
            out_BTHM = add_sink(out_BTHM, lse_BHT, sink_H)
        if heads.w_value_CHM is not None:
            out_BTHM = jnp.einsum("BTHC,CHM->BTHM", out_BTHM, heads.w_value_CHM)
        H, M, D = out_BTHM.shape[2], out_BTHM.shape[3], config.dim
        out_axes = (axes.HEADS, axes.HEAD_DIM, axes.FSDP_EMBED)
        w_out_HMD = weight(self, config, "w_out", (H, M, D), out_axes, H * M, residual=True)
        return jnp.einsum("BTHM,HMD->BTD", out_BTHM, w_out_HMD), losses, cache

    def _attend_self(self, heads: Heads, gate_BT: jax.Array | None, index: Index | None, packing: Packing):
        """Of a sequence to itself, by the kernels."""
        attention, pattern = self.config.attention, self.pattern
        q_BTHN = constrain(heads.q_BTHN, (axes.BATCH, axes.LENGTH, axes.HEADS, axes.HEAD_DIM))
        k_BTGN = constrain(heads.k_BTGN, (axes.BATCH, axes.LENGTH, axes.KV_HEADS, axes.HEAD_DIM))
        v_BTGM = constrain(heads.v_BTGM, (axes.BATCH, axes.LENGTH, axes.KV_HEADS, axes.HEAD_DIM))
        scale = softmax_scale(attention)
        if index is not None:
            assert isinstance(pattern, Sparse)
            out_BTHM, lse_BHT, loss_BT = sparse_attention(
                q_BTHN,
                k_BTGN,
                v_BTGM,
                index,
                pattern=pattern,
                scale=scale,
                place=packing.place,
                causal=attention.causal,
                softcap=attention.softcap,
                implementation=attention.implementation,
            )
            real_BT = packing.place.segment_BT > 0
            return out_BTHM, lse_BHT, {"indexer": jnp.sum(jnp.where(real_BT, loss_BT, 0))}
        out_BTHM, lse_BHT = windowed_attention(
            q_BTHN,
            k_BTGN,
            v_BTGM,
            pattern=pattern,
            scale=scale,
            causal=attention.causal,
            place=packing.place,
            gate_BT=gate_BT,
            softcap=attention.softcap,
            max_segments=packing.max_segments,
            implementation=attention.implementation,
        )
        return out_BTHM, lse_BHT, {}

    def _write(self, cache: LayerCache, stored: LayerCache, place: Place, step: CacheStep) -> LayerCache:
        layout = cache_layout(self.pattern, step.max_length, step.step)
        position_BT = jnp.where(place.segment_BT > 0, place.position_BT, -1)
        return tuple(write(layout, old, new, position_BT) for old, new in zip(cache, stored, strict=True))

    def _attend_cache(
        self, heads: Heads, index: Index | None, cache: LayerCache, q_place: Place, step: CacheStep
    ) -> tuple[jax.Array, jax.Array]:
        """Of new tokens, which are in the cache already, to all that the cache holds."""
        attention, pattern = self.config.attention, self.pattern
        layout = cache_layout(pattern, step.max_length, step.step)
        slot_BS = slot_positions(layout, step.length_B)
        k_place = Place(slot_BS, (slot_BS >= 0).astype(jnp.int32))
        gate_BS = cache[-1] if isinstance(pattern, LearnedGlobal) else None
        mask_BTS, bias_BTS = visible(pattern, q_place, k_place, causal=True, gate_BS=gate_BS)
        if layout.pinned:  # a global key is read from its pinned slot, and from the ring only where it is local
            q_window = None if q_place.window_BT is None else q_place.window_BT[:, :, None]
            local = local_mask(pattern, True, q_place.position_BT[:, :, None], slot_BS[:, None, :], q_window)
            mask_BTS &= local == (jnp.arange(layout.slots) < layout.ring)
        keys, values = stored_keys_values(self.config, cache[: len(heads.stored)])
        scale, softcap = softmax_scale(attention), attention.softcap
        name = attention.implementation  # kernels bear the same names; what has none for caches runs the oracle
        attend = functools.partial(
            decode_attention,
            scale=scale,
            softcap=softcap,
            implementation="reference" if name and name not in DECODE_IMPLEMENTATIONS else name,
        )
        if isinstance(pattern, Sparse) and pattern.stage == "sparse" and pattern.top_k < layout.slots:
            assert index is not None
            scores_BTS = jnp.where(mask_BTS, index_scores(index._replace(k_BSI=cache[-1])), -jnp.inf)
            return _attend_best(attend, heads.q_BTHN, keys, values, scores_BTS, pattern.top_k)
        return attend(heads.q_BTHN, keys, values, mask_BTS, bias_BTS=bias_BTS)


def _attend_best(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array | int,
    scores_BTS: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query to its own `count` best keys, gathered: linear in `count`, not in S."""
    B, T = q_BTHN.shape[:2]
    best_BTK, index_BTK = jax.lax.top_k(scores_BTS, count)

    def gather(x_BSGN):
        rows = jnp.take_along_axis(x_BSGN, index_BTK.reshape(B, T * count, 1, 1), axis=1)
        return rows.reshape(B * T, count, *x_BSGN.shape[2:])

    q = q_BTHN.reshape(B * T, 1, *q_BTHN.shape[2:])
    mask = (best_BTK > -jnp.inf).reshape(B * T, 1, count)
    values = v_BSGM if isinstance(v_BSGM, int) else gather(v_BSGM)
    out, lse = attend(q, gather(k_BSGN), values, mask)
    return out.reshape(B, T, *out.shape[2:]), jnp.swapaxes(lse.reshape(B, T, -1), 1, 2)
