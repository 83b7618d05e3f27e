"""Attention patterns: what each query may see, as pure functions of positions.

A pattern has two disjoint key sets. The *local* set is bounded by a look-back in positions, so that a kernel can skip
blocks; the *global* set is a handful of absolute positions of the query's own document, minus what is already local.
The union of the two is what the oracle masks with. All masks are causal.

Positions restart at 0 in each document of a packed row and rise by one; `segment_ids` number the documents of a row
1, 2, 3 … and are 0 on padding (whose positions rise by one as well).
"""

import jax
import jax.numpy as jnp

from dsv3_jax.config import Full, Pattern, Segmented, Windowed


def lookback(pattern: Pattern) -> int | None:
    """How many positions behind its query a local key can be; None if unbounded."""
    match pattern:
        case Full():
            return None
        case Windowed():
            return pattern.window - 1
        case Segmented():
            return pattern.segment - 1


def global_positions(pattern: Pattern) -> tuple[int, ...]:
    """The absolute positions of a document that all its later tokens see."""
    return pattern.global_positions if isinstance(pattern, Windowed) else ()


def local_mask(pattern: Pattern, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    """Whether a query sees a key of its own document through the local set. Arguments broadcast.

    Windowed(window=3), five positions, queries down, keys across:

        1 . . . .
        1 1 . . .
        1 1 1 . .
        . 1 1 1 .
        . . 1 1 1
    """
    causal = k_position <= q_position
    match pattern:
        case Full():
            return causal
        case Windowed():
            return causal & (q_position - k_position < pattern.window)
        case Segmented():
            return causal & (q_position // pattern.segment == k_position // pattern.segment)


def global_mask(pattern: Pattern, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    """Whether a query sees a key of its own document through the global set: a global position, not local already.

    Windowed(window=2, global_positions=(0,)), queries down, keys across (g global, 1 local):

        1 . . . .
        1 1 . . .
        g 1 1 . .
        g . 1 1 .
        g . . 1 1
    """
    positions = global_positions(pattern)
    chosen = jnp.isin(k_position, jnp.asarray(positions)) if positions else jnp.zeros_like(k_position, bool)
    return chosen & (k_position <= q_position) & ~local_mask(pattern, q_position, k_position)


def same_document(q_segment: jax.Array, k_segment: jax.Array) -> jax.Array:
    """Whether query and key belong to one document of a packed row. Padding (segment 0) sees nothing."""
    return (q_segment == k_segment) & (q_segment > 0)


def visible(pattern: Pattern, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """The whole mask, bool [B, T, T], queries before keys: the union of the local and the global set."""
    q_position, k_position = positions_BT[:, :, None], positions_BT[:, None, :]
    mask = local_mask(pattern, q_position, k_position) | global_mask(pattern, q_position, k_position)
    if segment_ids_BT is not None:
        mask &= same_document(segment_ids_BT[:, :, None], segment_ids_BT[:, None, :])
    return mask


def visible_keys(pattern: Pattern, length: int) -> float:
    """Mean number of keys a query of one unpacked document of `length` tokens sees. Counts the mask, without jax."""
    reach = lookback(pattern)
    if isinstance(pattern, Segmented):
        full, rest = divmod(length, pattern.segment)
        total = full * pattern.segment * (pattern.segment + 1) // 2 + rest * (rest + 1) // 2
    else:
        window = length if reach is None else min(reach + 1, length)
        total = window * (window + 1) // 2 + (length - window) * window
        total += sum(max(0, length - position - window) for position in global_positions(pattern))
    return total / length
