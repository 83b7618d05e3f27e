"""What kernels need to know of a pattern: each query sees the keys of one interval of its row, and blocks of them.

Documents lie one after the other in a row, so that every local key set is an interval of rows: of a sliding window, of
windows with a stride, of a segment, of a document, under causality or not, with a window set at run time. Kernels know
intervals alone. Which pairs of blocks may see each other follows from the pattern's reach and is static; which of them
do, and which see each other whole, follows from the intervals at run time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import LayerPattern
from dsv3_jax.ops.patterns import Place, local_range, reach

# Kinds of pairs of blocks. LOWER and UPPER are masked too: cut into equal parts, no query part sees a key part after it
# (at the diagonal), or before it (where a window ends).
SKIPPED, MASKED, WHOLE, LOWER, UPPER = range(5)


def visible_interval(pattern: LayerPattern, causal: bool, place: Place) -> tuple[jax.Array, jax.Array]:
    """First and last row that each token sees through the local set, int32 [B, T]; T and −1 where it sees nothing."""
    position_BT, segment_BT, window_BT = place
    T = position_BT.shape[1]
    row_T = jnp.arange(T, dtype=jnp.int32)
    shift_BT = row_T - position_BT  # the row where the document begins, if it begins here
    first_BT = jnp.maximum(shift_BT, 0)
    bounds = local_range(pattern, position_BT, window_BT)
    if bounds is not None:
        first_BT = jnp.maximum(first_BT, shift_BT + bounds[0])
    if causal:
        last_BT = jnp.broadcast_to(row_T, position_BT.shape)
    else:
        is_last_BT = jnp.concatenate(
            [segment_BT[:, 1:] != segment_BT[:, :-1], jnp.ones_like(segment_BT[:, :1])], axis=1
        )
        last_BT = jax.lax.cummin(jnp.where(is_last_BT > 0, row_T, T - 1), axis=1, reverse=True)
        if bounds is not None:
            last_BT = jnp.minimum(last_BT, shift_BT + bounds[1])
    real_BT = segment_BT > 0
    return jnp.where(real_BT, first_BT, T).astype(jnp.int32), jnp.where(real_BT, last_BT, -1).astype(jnp.int32)


def _reached(pattern: LayerPattern, causal: bool, length: int, q_block: int, k_block: int) -> tuple[Any, Any]:
    """For each block of queries the first key block that it may see, and the last plus one."""
    bound = reach(pattern)
    first_q = np.arange(0, length, q_block)
    last_q = np.minimum(first_q + q_block, length) - 1
    low = np.zeros_like(first_q) if bound is None else np.maximum(first_q - bound, 0)
    furthest = np.full_like(last_q, length - 1) if bound is None else np.minimum(last_q + bound, length - 1)
    return low // k_block, (last_q if causal else furthest) // k_block + 1


def block_pairs(pattern: LayerPattern, causal: bool, length: int, q_block: int, k_block: int) -> np.ndarray:
    """The pairs (query block, key block) that may see each other, int32 [S, 2], by query block, then key block."""
    bounds = zip(*_reached(pattern, causal, length, q_block, k_block), strict=True)
    return np.asarray([(i, j) for i, (start, stop) in enumerate(bounds) for j in range(start, stop)], np.int32)


def num_block_pairs(pattern: LayerPattern, causal: bool, length: int, q_block: int, k_block: int) -> int:
    """How many they are."""
    start, stop = _reached(pattern, causal, length, q_block, k_block)
    return int(np.sum(stop - start))


class Schedule(NamedTuple):
    """The steps of a kernel's innermost loop: pairs of blocks, those of one owner together.

    owner_S, other_S: blocks of each step; the owner's results are kept on chip from its first step to its last.
    fetch_BS: the other block that is in memory: at steps that are skipped the one before, so that nothing is loaded.
    kind_BS: SKIPPED, MASKED, …
    """

    owner_S: np.ndarray
    other_S: np.ndarray
    fetch_BS: jax.Array
    kind_BS: jax.Array


def _kinds(
    pairs_S2: np.ndarray, first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int, part: int
) -> jax.Array:
    q_S, k_S = pairs_S2.T
    first_BnS, last_BnS = (x.reshape(len(x), -1, q_block) for x in (first_BT, last_BT))
    begin_S, end_S = k_S * k_block, (k_S + 1) * k_block - 1
    seen_BS = (jnp.min(first_BnS, axis=-1)[:, q_S] <= end_S) & (jnp.max(last_BnS, axis=-1)[:, q_S] >= begin_S)
    whole_BS = (jnp.max(first_BnS, axis=-1)[:, q_S] <= begin_S) & (jnp.min(last_BnS, axis=-1)[:, q_S] >= end_S)
    kind_BS = jnp.where(seen_BS, jnp.where(whole_BS, WHOLE, MASKED), SKIPPED)
    if q_block == k_block and q_block > part:
        of_parts = (len(first_BT), -1, q_block // part, 1, part)
        first_BnQ1 = jnp.min(first_BT.reshape(of_parts), axis=-1)[:, q_S]
        last_BnQ1 = jnp.max(last_BT.reshape(of_parts), axis=-1)[:, q_S]
        begin_SK = begin_S[:, None, None] + np.arange(0, k_block, part)
        seen_BSQK = (first_BnQ1 <= begin_SK + part - 1) & (last_BnQ1 >= begin_SK)
        after = np.triu(np.ones((q_block // part,) * 2, bool), 1)  # key parts after the query part
        for kind, hidden in ((LOWER, after), (UPPER, after.T)):
            fits_BS = ~jnp.any(seen_BSQK & hidden, axis=(2, 3))
            kind_BS = jnp.where((kind_BS == MASKED) & fits_BS, kind, kind_BS)
    return kind_BS.astype(jnp.int32)


def _schedule(owner_S: np.ndarray, other_S: np.ndarray, kind_BS: jax.Array) -> Schedule:
    step_S = jnp.arange(len(owner_S), dtype=jnp.int32)
    at_BS = jax.lax.cummax(jnp.where(kind_BS > SKIPPED, step_S, 0), axis=1)
    return Schedule(owner_S, other_S, jnp.asarray(other_S)[at_BS], kind_BS)


def schedule_by_query(
    pairs_S2: np.ndarray, first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int, part: int
) -> Schedule:
    """Query blocks own their steps. first_BT, last_BT: of `visible_interval`, padded to whole blocks with T and −1.
    part: into how large parts LOWER and UPPER cut blocks of one size."""
    q_S, k_S = pairs_S2.T
    return _schedule(q_S, k_S, _kinds(pairs_S2, first_BT, last_BT, q_block, k_block, part))


def schedule_by_key(
    pairs_S2: np.ndarray, first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int, part: int
) -> Schedule:
    """Key blocks own their steps, in the order of their query blocks."""
    q_S, k_S = ordered_S2 = pairs_S2[np.lexsort((pairs_S2[:, 0], pairs_S2[:, 1]))].T
    return _schedule(k_S, q_S, _kinds(ordered_S2.T, first_BT, last_BT, q_block, k_block, part))


def under_way(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Of a schedule that key blocks own: the query blocks that have begun and are not complete, at each step the first
    of them and the last, int32 [S]. One begins where the last rises, and is complete where the first is about to."""
    _, back_n = np.unique(schedule.other_S[::-1], return_index=True)
    last_step_n = len(schedule.other_S) - 1 - back_n  # rises with n, as the last key block of a query block does
    oldest_S = np.searchsorted(last_step_n, np.arange(len(schedule.other_S)))
    return oldest_S.astype(np.int32), np.maximum.accumulate(schedule.other_S)


def _outer_bounds(first_BT: jax.Array, last_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Earliest first and latest last key of each block of queries, [B, blocks]."""
    first_BnS, last_BnS = (x_BT.reshape(len(x_BT), -1, block) for x_BT in (first_BT, last_BT))
    return jnp.min(first_BnS, axis=-1), jnp.max(last_BnS, axis=-1)


def key_blocks(first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """For each block of queries the first key block that one of them sees, and the last plus one: int32 [B, blocks, 2].
    Equal where none is seen. Arguments as `schedule_by_query` takes them."""
    first_Bn, last_Bn = _outer_bounds(first_BT, last_BT, q_block)
    some_Bn = first_Bn <= last_Bn
    return jnp.where(some_Bn[..., None], jnp.stack([first_Bn // k_block, last_Bn // k_block + 1], axis=-1), 0)


def query_blocks(first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """For each block of keys the first query block that sees one of them, and the last plus one: int32 [B, blocks, 2].
    Equal where none does."""
    first_Bn, last_Bn = _outer_bounds(first_BT, last_BT, q_block)
    begin_m = jnp.arange(0, first_BT.shape[1], k_block)
    seen_Bmn = (first_Bn[:, None] < begin_m[:, None] + k_block) & (last_Bn[:, None] >= begin_m[:, None])
    start_Bm = jnp.argmax(seen_Bmn, axis=-1)
    stop_Bm = seen_Bmn.shape[-1] - jnp.argmax(seen_Bmn[..., ::-1], axis=-1)
    some_Bm1 = jnp.any(seen_Bmn, axis=-1, keepdims=True)
    return jnp.where(some_Bm1, jnp.stack([start_Bm, stop_Bm], axis=-1), 0).astype(jnp.int32)


def whole_key_blocks(first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """For each block of queries the first of the key blocks that all of them see all of, and the last plus one: int32
    [B, blocks, 2]. Not above the first where there is none."""
    first_BnS, last_BnS = (x_BT.reshape(len(x_BT), -1, q_block) for x_BT in (first_BT, last_BT))
    start_Bn = -(-jnp.max(first_BnS, axis=-1) // k_block)
    return jnp.stack([start_Bn, (jnp.min(last_BnS, axis=-1) + 1) // k_block], axis=-1).astype(jnp.int32)


def whole_query_blocks(first_BT: jax.Array, last_BT: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """For each block of keys the first run of query blocks of which all see all of it: its first block, and its last
    plus one, int32 [B, blocks, 2]. Equal where there is none."""
    first_BnS, last_BnS = (x_BT.reshape(len(x_BT), -1, q_block) for x_BT in (first_BT, last_BT))
    begin_m = jnp.arange(0, first_BT.shape[1], k_block)
    whole_Bmn = (jnp.max(first_BnS, axis=-1)[:, None] <= begin_m[:, None]) & (
        jnp.min(last_BnS, axis=-1)[:, None] >= begin_m[:, None] + (k_block - 1)
    )
    start_Bm = jnp.argmax(whole_Bmn, axis=-1)
    block_n = jnp.arange(whole_Bmn.shape[-1])
    ends_Bmn = ~whole_Bmn & (block_n > start_Bm[..., None])
    stop_Bm = jnp.where(jnp.any(ends_Bmn, axis=-1), jnp.argmax(ends_Bmn, axis=-1), len(block_n))
    some_Bm1 = jnp.any(whole_Bmn, axis=-1, keepdims=True)
    return jnp.where(some_Bm1, jnp.stack([start_Bm, stop_Bm], axis=-1), 0).astype(jnp.int32)
