"""Attention patterns: what each query may see, as pure functions of positions (and of a gate, where one is learned).

A pattern has two disjoint key sets. The *local* set is bounded in positions, so that a kernel can skip blocks; the
*global* set is a handful of keys of the query's own document, minus what is already local. The union of the two, in one
softmax, is what the oracle masks with.

Positions restart at 0 in each document of a packed row and rise by one; `segment_ids` number the documents of a row
1, 2, 3 … and are 0 on padding (whose positions rise by one as well).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import (
    Full,
    LayerPattern,
    LearnedGlobal,
    Pattern,
    PerLayer,
    RuntimeWindowed,
    Segmented,
    Sparse,
    Windowed,
)


class Place(NamedTuple):
    """Where tokens stand, int32 [B, T]: position and document; and the window that each has at run time, if any."""

    position_BT: jax.Array
    segment_BT: jax.Array
    window_BT: jax.Array | None = None


def layer_patterns(pattern: Pattern) -> tuple[LayerPattern, ...]:
    """The patterns that layers take in turn."""
    return pattern.patterns if isinstance(pattern, PerLayer) else (pattern,)


def reach(pattern: LayerPattern) -> int | None:
    """How many positions from its query a local key can be; None if unbounded."""
    match pattern:
        case Full() | Sparse():
            return None
        case Windowed() | RuntimeWindowed() | LearnedGlobal():
            return pattern.window - 1
        case Segmented():
            return None if pattern.keys == "all" else pattern.segment - 1


def global_positions(pattern: LayerPattern) -> tuple[int, ...]:
    """The absolute positions of a document that all its tokens see; under causality the later ones."""
    return pattern.global_positions if isinstance(pattern, Windowed | RuntimeWindowed) else ()


def global_fractions(pattern: LayerPattern) -> tuple[float, ...]:
    """Positions that all tokens of a document see, as a share of its length."""
    return pattern.global_fractions if isinstance(pattern, Windowed) else ()


def task_windows(pattern: Pattern, tasks: Sequence[str]) -> np.ndarray | None:
    """The window of each task by name, int32; None where no layer's window is set at run time.

    A task without a window of its own has the largest of all layers: each layer takes no more than its pattern's.
    """
    members = [member for member in layer_patterns(pattern) if isinstance(member, RuntimeWindowed)]
    if not members:
        return None
    named = {entry.task: entry.window for entry in members[0].tasks}  # the same in every layer
    largest = max(member.window for member in members)
    return np.asarray([named.get(task, largest) for task in tasks], np.int32)


def fraction_position(fraction: float, length: jax.Array) -> jax.Array:
    """The position at a share of a document's length: 0 the first token, 1 the last."""
    return jnp.floor(fraction * (length - 1)).astype(jnp.int32)


def local_range(pattern: LayerPattern, q_position, q_window):
    """First and last position that a query sees locally, causality aside; None for all."""
    match pattern:
        case Windowed() | LearnedGlobal():
            first = (
                -((pattern.window - 1 - q_position) // pattern.stride) * pattern.stride
            )  # first window that holds it
            return first, q_position // pattern.stride * pattern.stride + pattern.window - 1
        case RuntimeWindowed():
            window = pattern.window if q_window is None else jnp.minimum(q_window, pattern.window)
            return q_position - window + 1, q_position + window - 1
        case Segmented(segment, "segment"):
            first = q_position // segment * segment
            return first, first + segment - 1
    return None


def local_mask(pattern: LayerPattern, causal: bool, q_position, k_position, q_window=None) -> jax.Array:
    """Whether a query sees a key of its own document through the local set. Arguments broadcast.

    Causal, six positions, queries down, keys across:

        Windowed(3)         Windowed(4, stride=2)   Segmented(3)
        1 . . . . .         1 . . . . .             1 . . . . .
        1 1 . . . .         1 1 . . . .             1 1 . . . .
        1 1 1 . . .         1 1 1 . . .             1 1 1 . . .
        . 1 1 1 . .         1 1 1 1 . .             . . . 1 . .
        . . 1 1 1 .         . . 1 1 1 .             . . . 1 1 .
        . . . 1 1 1         . . 1 1 1 1             . . . 1 1 1
    """
    mask = (
        k_position <= q_position if causal else jnp.ones(jnp.broadcast_shapes(k_position.shape, q_position.shape), bool)
    )
    bounds = local_range(pattern, q_position, q_window)
    return mask if bounds is None else mask & (k_position >= bounds[0]) & (k_position <= bounds[1])


def same_document(q_segment: jax.Array, k_segment: jax.Array) -> jax.Array:
    """Whether query and key belong to one document of a packed row. Padding (segment 0) sees nothing."""
    return (q_segment == k_segment) & (q_segment > 0)


def _is_global(pattern: LayerPattern, k_position, k_segment) -> jax.Array:
    """Which keys are at a global position or share of their document, bool [B, S]."""
    chosen = jnp.isin(k_position, jnp.asarray(global_positions(pattern), jnp.int32))
    if global_fractions(pattern):
        length = jnp.sum(k_segment[:, :, None] == k_segment[:, None, :], axis=-1)
        for fraction in global_fractions(pattern):
            chosen |= k_position == fraction_position(fraction, length)
    return chosen


def best_keys(scores_BTS: jax.Array, count: int) -> jax.Array:
    """The `count` best keys of each query above −inf, bool [B, T, S]; the first of equals. Has no gradient."""
    scores_BTS = jax.lax.stop_gradient(scores_BTS)
    if count >= scores_BTS.shape[-1]:
        return scores_BTS > -jnp.inf
    best, index = jax.lax.top_k(scores_BTS, count)
    return jnp.put_along_axis(jnp.zeros(scores_BTS.shape, bool), index, best > -jnp.inf, axis=-1, inplace=False)


def _learned(pattern: LearnedGlobal, causal: bool, q: Place, k: Place, gate_BS: jax.Array) -> jax.Array:
    """The `top_k` best keys of each query among those it may choose from, bool [B, T, S]; the first of equals.

    Under causality those of the blocks before its own: a choice among the query's own block would depend on tokens
    that come after some of its queries.
    """
    allowed = same_document(q.segment_BT[:, :, None], k.segment_BT[:, None, :])
    if causal:
        block_start = q.position_BT // pattern.window * pattern.window
        allowed &= k.position_BT[:, None, :] < block_start[:, :, None]
    return best_keys(jnp.where(allowed, gate_BS[:, None, :], -jnp.inf), pattern.top_k)


def visible(
    pattern: LayerPattern, q: Place, k: Place, *, causal: bool = True, gate_BS: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The whole mask, bool [B, T, S], queries before keys: the union of the local and the global set; and what is added
    to scores, float32 [B, T, S] or None (the log-sigmoid of the gate on learned global keys).

    Windowed(window=2, global_positions=(0,)), causal, queries down, keys across (g global, 1 local):

        1 . . . .
        1 1 . . .
        g 1 1 . .
        g . 1 1 .
        g . . 1 1

    LearnedGlobal(window=2, stride=2, top_k=1) where the gate scores token 1 best, then 3, 2, 0:

        1 . . . . .
        1 1 . . . .
        . g 1 . . .
        . g 1 1 . .
        . g . . 1 .
        . g . . 1 1

    `Sparse` is the mask of what its indexer chooses from.
    """
    q_position, k_position = q.position_BT[:, :, None], k.position_BT[:, None, :]
    q_window = None if q.window_BT is None else q.window_BT[:, :, None]
    document = same_document(q.segment_BT[:, :, None], k.segment_BT[:, None, :])
    local = document & local_mask(pattern, causal, q_position, k_position, q_window)
    if isinstance(pattern, LearnedGlobal):
        if gate_BS is None:
            raise ValueError("learned_global needs the gate's score of every key")
        chosen = _learned(pattern, causal, q, k, gate_BS) & ~local
        return local | chosen, jnp.where(chosen, jax.nn.log_sigmoid(gate_BS)[:, None, :], 0.0)
    chosen = document & _is_global(pattern, k.position_BT, k.segment_BT)[:, None, :]
    if causal:
        chosen &= k_position <= q_position
    return local | chosen, None


def visible_keys(pattern: LayerPattern, length: int, causal: bool = True) -> float:
    """Mean number of keys a query of one unpacked document of `length` tokens sees. Counted without jax.

    Run-time windows count at their largest, learned global keys as if none of them were local too.
    """
    q = np.arange(length)
    last = q if causal else np.full(length, length - 1)
    bounds = local_range(pattern, q, None)
    low, high = (
        (np.zeros(length, int), last) if bounds is None else (np.maximum(bounds[0], 0), np.minimum(bounds[1], last))
    )
    count = high - low + 1
    fractions = [math.floor(f * (length - 1)) for f in global_fractions(pattern)]
    for position in {p for p in (*global_positions(pattern), *fractions) if p < length}:
        count = count + ((position <= last) & ((position < low) | (position > high)))
    match pattern:
        case LearnedGlobal():
            before = q // pattern.window * pattern.window if causal else length - count
            count = count + np.minimum(pattern.top_k, before)
        case Sparse(top_k, stage="sparse"):
            count = np.minimum(count, top_k)
    return float(count.mean())
