"""The small second key set of blocked attention: which keys of a row are global, block by block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import LayerPattern, LearnedGlobal
from dsv3_jax.ops.patterns import Place, fraction_position, global_fractions, global_positions, local_mask


class GlobalKeys(NamedTuple):
    """Global keys [B, m, P] of each query block, or of all blocks alike (m = 1); segment −1 where there is none.

    row: their index in the row. owner: the block of positions they were chosen for, where each has a choice of its own.
    """

    row_BmP: jax.Array
    position_BmP: jax.Array
    segment_BmP: jax.Array
    owner_BmP: jax.Array | None = None


def has_global_keys(pattern: LayerPattern) -> bool:
    """Whether the pattern has a second key set."""
    return isinstance(pattern, LearnedGlobal) or bool(global_positions(pattern) or global_fractions(pattern))


def find_global_keys(
    pattern: LayerPattern, causal: bool, place: Place, gate_BT: jax.Array | None, max_segments: int, block: int
) -> GlobalKeys:
    """The global keys of a row. `block`: tokens a query block, at most the window of a `LearnedGlobal`."""
    if isinstance(pattern, LearnedGlobal):
        assert gate_BT is not None
        choose = _chosen_before if causal else _chosen_of_document
        return choose(pattern, place, jax.lax.stop_gradient(gate_BT), block if causal else max_segments)
    return _at_positions(pattern, place, max_segments)


def _at_positions(pattern: LayerPattern, place: Place, max_segments: int) -> GlobalKeys:
    """Absolute positions and shares of the length, of documents 1 … max_segments."""
    ids = jnp.arange(1, max_segments + 1)
    belongs_BsT = place.segment_BT[:, None, :] == ids[:, None]
    start_Bs = jnp.argmax(belongs_BsT, axis=-1)
    B, T = place.segment_BT.shape
    offsets = [jnp.full((B, max_segments), position) for position in global_positions(pattern)]
    length_Bs = jnp.sum(belongs_BsT, axis=-1)
    # A share of the length that falls on a position given already would count its key twice.
    for fraction in global_fractions(pattern):
        offset = fraction_position(fraction, length_Bs)
        seen = jnp.any(jnp.stack([offset == other for other in offsets]), axis=0) if offsets else False
        offsets.append(jnp.where(seen, T, offset))
    offset_Bsp = jnp.stack(offsets, axis=-1)
    row_Bsp = start_Bs[..., None] + offset_Bsp
    clipped_Bsp = jnp.minimum(row_Bsp, T - 1)
    segment_Bsp = jnp.take_along_axis(place.segment_BT, clipped_Bsp.reshape(B, -1), axis=1).reshape(clipped_Bsp.shape)
    found = (row_Bsp == clipped_Bsp) & (segment_Bsp == ids[:, None])
    segment_Bsp = jnp.where(found, ids[:, None], -1)
    return GlobalKeys(*(x.reshape(B, 1, -1) for x in (clipped_Bsp, offset_Bsp, segment_Bsp)))


def _best(pattern: LearnedGlobal, allowed_BmT: jax.Array, gate_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of the best allowed keys [B, m, K], and whether each is one."""
    scores = jnp.where(allowed_BmT, gate_BT[:, None, :], -jnp.inf)
    best, row = jax.lax.top_k(scores, min(pattern.top_k, scores.shape[-1]))
    return row, best > -jnp.inf


def _take(x_BT: jax.Array, row_BmP: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BT[:, None, :], row_BmP, axis=-1)


def _chosen_of_document(pattern: LearnedGlobal, place: Place, gate_BT: jax.Array, max_segments: int) -> GlobalKeys:
    """The best keys of each document, whatever the query."""
    ids = jnp.arange(1, max_segments + 1)
    row_BsK, found = _best(pattern, place.segment_BT[:, None, :] == ids[:, None], gate_BT)
    segment_BsK = jnp.where(found, ids[:, None], -1)
    B = gate_BT.shape[0]
    row_B1P = row_BsK.reshape(B, 1, -1)
    return GlobalKeys(row_B1P, _take(place.position_BT, row_B1P), segment_BsK.reshape(B, 1, -1))


def _chosen_before(pattern: LearnedGlobal, place: Place, gate_BT: jax.Array, block: int) -> GlobalKeys:
    """The best keys before each query's own block of positions.

    Blocks of positions begin with each document, query blocks with the row. A query block no longer than the window
    meets at most two blocks of positions that have anything before them: those of its first and last such token.
    """
    B, T = gate_BT.shape

    def cut(x_BT):
        return jnp.pad(x_BT, [(0, 0), (0, -T % block)]).reshape(B, -1, block)

    owner_BnS, segment_BnS = cut(place.position_BT) // pattern.window, cut(place.segment_BT)
    busy_BnS = (owner_BnS > 0) & (segment_BnS > 0)
    ends = jnp.stack([jnp.argmax(busy_BnS, axis=-1), block - 1 - jnp.argmax(busy_BnS[..., ::-1], axis=-1)], axis=-1)
    owner_Bn2, segment_Bn2 = (jnp.take_along_axis(x, ends, axis=-1) for x in (owner_BnS, segment_BnS))
    same_Bn = (owner_Bn2[..., 0] == owner_Bn2[..., 1]) & (segment_Bn2[..., 0] == segment_Bn2[..., 1])
    usable_Bn2 = jnp.any(busy_BnS, axis=-1)[..., None] & jnp.stack([jnp.ones_like(same_Bn), ~same_Bn], axis=-1)
    segment_Bm, owner_Bm = (x.reshape(B, -1) for x in (jnp.where(usable_Bn2, segment_Bn2, -1), owner_Bn2))
    allowed_BmT = (place.segment_BT[:, None, :] == segment_Bm[..., None]) & (
        place.position_BT[:, None, :] < owner_Bm[..., None] * pattern.window
    )
    row_BmK, found_BmK = _best(pattern, allowed_BmT, gate_BT)
    segment_BmK = jnp.where(found_BmK, segment_Bm[..., None], -1)
    owner_BmK = jnp.broadcast_to(owner_Bm[..., None], row_BmK.shape)
    row, segment, owner = (x.reshape(B, owner_BnS.shape[1], -1) for x in (row_BmK, segment_BmK, owner_BmK))
    position = _take(place.position_BT, row)
    return GlobalKeys(row, position, segment, owner)


def global_mask(pattern: LayerPattern, causal: bool, keys: GlobalKeys, q_position, q_segment, q_window) -> jax.Array:
    """Whether a query [B, c, S] sees a global key [B, c, S, P]: its document's, not local already, not later."""
    position, segment = keys.position_BmP[:, :, None], keys.segment_BmP[:, :, None]
    q_position, q_segment = q_position[..., None], q_segment[..., None]
    q_window = None if q_window is None else q_window[..., None]
    mask = (segment == q_segment) & ~local_mask(pattern, causal, q_position, position, q_window)
    if keys.owner_BmP is not None:
        assert isinstance(pattern, LearnedGlobal)
        mask &= keys.owner_BmP[:, :, None] == q_position // pattern.window
    return mask & (position <= q_position) if causal else mask
