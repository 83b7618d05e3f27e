"""Blocked attention in plain JAX: what no query of a block sees is never computed. The default on CPU.

Rows are cut into blocks of S tokens. Query block i sees key blocks i − reach … i, where reach follows from the
pattern's look-back; runs of query blocks with equally long spans are computed as one batched matmul. Global positions
are a second, small key set in the same softmax. The backward pass recomputes the probabilities from the log-sum-exp
(FlashAttention-2, Dao 2023, arXiv:2307.08691), so that memory is linear in T.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Pattern
from dsv3_jax.ops.patterns import global_mask, global_positions, local_mask, lookback, same_document


class Run(NamedTuple):
    """Query blocks first … first + count − 1, each of which sees its `length` last key blocks, itself included."""

    first: int
    count: int
    length: int


def block_size(length: int, reach: int | None) -> int:
    """Tokens a block: large enough for a matmul, no larger than the window or the row need.

    With no bound on the look-back every block is a run of its own, so blocks grow with the row, to keep runs few.
    """
    largest = 128 if reach is not None else min(512, max(128, length // 4))
    block = 16
    while block < largest and block < length and (reach is None or block <= reach):
        block *= 2
    return block


def plan_runs(num_blocks: int, block: int, reach: int | None) -> list[Run]:
    """Splits query blocks into runs of equal span. The visible block pairs are Σ count · length."""
    behind = num_blocks if reach is None else -(-reach // block)
    full_span = min(behind + 1, num_blocks)
    ramp = [Run(i, 1, i + 1) for i in range(full_span - 1)]
    return [*ramp, Run(full_span - 1, num_blocks - full_span + 1, full_span)]


def _to_blocks(x_BT: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] -> [B, blocks, block, ...], padded with zeros at the end (segment 0 is padding)."""
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % block)] + [(0, 0)] * len(rest))
    return x_BT.reshape(B, -1, block, *rest)


def _heads_first(x_BTHN: jax.Array, block: int, groups: int) -> jax.Array:
    """[B, T, G · h, N] -> [B, G, blocks, h, block, N]: every product is then a plain batched matmul."""
    B, T, H, N = x_BTHN.shape
    x_BnSGhN = _to_blocks(x_BTHN.reshape(B, T, groups, H // groups, N), block)
    return jnp.transpose(x_BnSGhN, (0, 3, 1, 4, 2, 5))


def _heads_last(x_BGnhSN: jax.Array, length: int) -> jax.Array:
    """The inverse of `_heads_first`."""
    B, G, n, h, S, N = x_BGnhSN.shape
    return jnp.transpose(x_BGnhSN, (0, 2, 4, 1, 3, 5)).reshape(B, n * S, G * h, N)[:, :length]


def _span(x_BGnS: jax.Array, run: Run) -> jax.Array:
    """Each query block's keys: [B, G, blocks, S, ...] -> [B, G, count, length · S, ...]."""
    low = run.first - run.length + 1
    if run.count == 1:
        x = x_BGnS[:, :, low : run.first + 1]
        return x.reshape(*x.shape[:2], 1, run.length * x.shape[3], *x.shape[4:])
    return jnp.concatenate([x_BGnS[:, :, low + j : low + j + run.count] for j in range(run.length)], axis=3)


def _add_span(total_BGnSN: jax.Array, span: jax.Array, run: Run) -> jax.Array:
    """The transpose of `_span`: adds each block's share of `span` back."""
    low, S = run.first - run.length + 1, total_BGnSN.shape[3]
    if run.count == 1:
        return total_BGnSN.at[:, :, low : run.first + 1].add(span.reshape(*span.shape[:2], run.length, S, -1))
    for j in range(run.length):
        block = span[:, :, :, j * S : (j + 1) * S]
        total_BGnSN = total_BGnSN.at[:, :, low + j : low + j + run.count].add(block)
    return total_BGnSN


def _global_rows(pattern: Pattern, segments_BT: jax.Array, max_segments: int) -> tuple[jax.Array, ...]:
    """Row index, position and segment [B, P] of every document's global keys; segment −1 where there is none."""
    offsets = jnp.asarray(global_positions(pattern), jnp.int32)
    ids = jnp.arange(1, max_segments + 1)
    start_Bs = jnp.argmax(segments_BT[:, None, :] == ids[:, None], axis=-1)
    rows_BP = (start_Bs[..., None] + offsets).reshape(segments_BT.shape[0], -1)
    wanted_P = jnp.repeat(ids, len(offsets))
    clipped_BP = jnp.minimum(rows_BP, segments_BT.shape[1] - 1)
    found = (rows_BP == clipped_BP) & (jnp.take_along_axis(segments_BT, clipped_BP, axis=1) == wanted_P)
    position_BP = jnp.broadcast_to(jnp.tile(offsets, max_segments), rows_BP.shape)
    return clipped_BP, position_BP, jnp.where(found, wanted_P, -1)


class _Blocks(NamedTuple):
    """Inputs cut into blocks: q, k, v heads first; positions and segments [B, 1, n, S]; the global key set, if any."""

    q_BGnhSN: jax.Array
    k_BGnSN: jax.Array
    v_BGnSM: jax.Array
    positions_B1nS: jax.Array
    segments_B1nS: jax.Array
    rows_BP: jax.Array | None = None
    k_global_BG1PN: jax.Array | None = None
    v_global_BG1PM: jax.Array | None = None
    positions_B11P: jax.Array | None = None
    segments_B11P: jax.Array | None = None


def _cut(q, k, v, positions, segments, pattern: Pattern, max_segments: int, block: int) -> _Blocks:
    G = k.shape[2]
    blocks = _Blocks(
        _heads_first(q, block, G),
        _heads_first(k, block, G)[:, :, :, 0],
        _heads_first(v, block, G)[:, :, :, 0],
        _to_blocks(positions, block)[:, None],
        _to_blocks(segments, block)[:, None],
    )
    if not global_positions(pattern):
        return blocks
    rows_BP, positions_BP, segments_BP = _global_rows(pattern, segments, max_segments)

    def pick(x_BTGN):
        return jnp.swapaxes(jnp.take_along_axis(x_BTGN, rows_BP[..., None, None], axis=1), 1, 2)[:, :, None]

    return blocks._replace(
        rows_BP=rows_BP,
        k_global_BG1PN=pick(k),
        v_global_BG1PM=pick(v),
        positions_B11P=positions_BP[:, None, None],
        segments_B11P=segments_BP[:, None, None],
    )


def _key_sets(blocks: _Blocks, run: Run, pattern: Pattern, scale: float):
    """For the local and then the global key set of a run: scores [B, G, count, h, S, keys], −inf where not visible;
    keys [B, G, count or 1, keys, N]; values."""
    at = slice(run.first, run.first + run.count)
    q, q_position, q_segment = (
        blocks.q_BGnhSN[:, :, at],
        blocks.positions_B1nS[:, :, at],
        blocks.segments_B1nS[:, :, at],
    )

    def key_set(keys, values, k_position, k_segment, allowed):
        scores = jnp.einsum("BGchSN,BGcKN->BGchSK", q, keys, preferred_element_type=jnp.float32)
        mask = allowed(pattern, q_position[..., None], k_position[..., None, :])
        mask &= same_document(q_segment[..., None], k_segment[..., None, :])
        return jnp.where(mask[:, :, :, None], scores * scale, -jnp.inf), keys, values

    k, v, k_position, k_segment = (_span(x, run) for x in blocks[1:5])
    sets = [key_set(k, v, k_position, k_segment, local_mask)]
    if blocks.rows_BP is not None:
        k, v, k_position, k_segment = (jnp.repeat(x, run.count, axis=2) for x in blocks[6:] if x is not None)
        sets.append(key_set(k, v, k_position, k_segment, global_mask))
    return sets


def blocked_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    pattern: Pattern,
    scale: float,
    max_segments: int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`."""
    B, T, H, _ = q_BTHN.shape
    G, reach = k_BTGN.shape[2], lookback(pattern)
    block = block_size(T, reach)

    def runs(blocks):
        return plan_runs(blocks.k_BGnSN.shape[2], block, reach)

    def forward(q, k, v, positions, segments):
        blocks = _cut(q, k, v, positions, segments, pattern, max_segments, block)
        outs, lses = [], []
        for run in runs(blocks):
            sets = _key_sets(blocks, run, pattern, scale)
            peak = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s, _, _ in sets])
            peak = jnp.where(jnp.isfinite(peak), peak, 0)
            exps = [jnp.exp(scores - peak) for scores, _, _ in sets]
            total = sum(jnp.sum(exp, axis=-1, keepdims=True) for exp in exps)
            out = sum(
                jnp.einsum("BGchSK,BGcKM->BGchSM", exp.astype(v.dtype), values, preferred_element_type=jnp.float32)
                for exp, (_, _, values) in zip(exps, sets, strict=True)
            )
            outs.append(jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0).astype(v.dtype))
            lses.append((peak + jnp.log(total))[..., 0])
        out_BGnhSM, lse_BGnhS = jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
        if blocks.rows_BP is not None:
            beyond = (blocks.segments_B1nS > max_segments)[:, :, :, None, :, None]
            out_BGnhSM = jnp.where(beyond, jnp.nan, out_BGnhSM).astype(v.dtype)
        lse_BHT = jnp.moveaxis(lse_BGnhS, 2, 3).reshape(B, H, -1)[..., :T]
        return (_heads_last(out_BGnhSM, T), lse_BHT), (out_BGnhSM, lse_BGnhS)

    @jax.custom_vjp
    def attend(*inputs):
        return forward(*inputs)[0]

    def attend_forward(*inputs):
        result, saved = forward(*inputs)
        return result, (inputs, saved)

    def attend_backward(saved, cotangents):
        inputs, (out_BGnhSM, lse_BGnhS) = saved
        q, k, v = inputs[:3]
        blocks = _cut(q, k, v, inputs[3], inputs[4], pattern, max_segments, block)
        dout_BGnhSM = _heads_first(cotangents[0], block, G)
        dlse_BGnhS = _heads_first(jnp.moveaxis(cotangents[1], 1, 2)[..., None], block, G)[..., 0]
        # d scores = p · (dout · v − Σ dout · out + dlse)
        delta_BGnhS = jnp.sum(dout_BGnhSM.astype(jnp.float32) * out_BGnhSM.astype(jnp.float32), axis=-1) - dlse_BGnhS
        lse_BGnhS = jnp.where(jnp.isfinite(lse_BGnhS), lse_BGnhS, 0)
        dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (blocks.k_BGnSN, blocks.v_BGnSM))
        dqs, dk_global, dv_global = [], 0.0, 0.0
        for run in runs(blocks):
            at = slice(run.first, run.first + run.count)
            q_run, dout_run = blocks.q_BGnhSN[:, :, at], dout_BGnhSM[:, :, at]
            dq, dkeys, dvalues = 0.0, [], []
            for scores, keys, values in _key_sets(blocks, run, pattern, scale):
                p = jnp.exp(scores - lse_BGnhS[:, :, at, ..., None])
                dp = jnp.einsum("BGchSM,BGcKM->BGchSK", dout_run, values, preferred_element_type=jnp.float32)
                ds = (p * (dp - delta_BGnhS[:, :, at, ..., None]) * scale).astype(q.dtype)
                p = p.astype(q.dtype)
                dq += jnp.einsum("BGchSK,BGcKN->BGchSN", ds, keys, preferred_element_type=jnp.float32)
                dkeys.append(jnp.einsum("BGchSK,BGchSN->BGcKN", ds, q_run, preferred_element_type=jnp.float32))
                dvalues.append(jnp.einsum("BGchSK,BGchSM->BGcKM", p, dout_run, preferred_element_type=jnp.float32))
            dqs.append(dq)
            dk, dv = _add_span(dk, dkeys[0], run), _add_span(dv, dvalues[0], run)
            if len(dkeys) > 1:
                dk_global, dv_global = dk_global + jnp.sum(dkeys[1], axis=2), dv_global + jnp.sum(dvalues[1], axis=2)
        dq_BTHN = _heads_last(jnp.concatenate(dqs, axis=2), T)
        dk_BTGN, dv_BTGM = (_heads_last(x[:, :, :, None], T) for x in (dk, dv))
        if blocks.rows_BP is not None:
            index = (jnp.arange(B)[:, None], blocks.rows_BP)
            dk_BTGN = dk_BTGN.at[index].add(jnp.swapaxes(dk_global, 1, 2))
            dv_BTGM = dv_BTGM.at[index].add(jnp.swapaxes(dv_global, 1, 2))
        return dq_BTHN.astype(q.dtype), dk_BTGN.astype(k.dtype), dv_BTGM.astype(v.dtype), None, None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_BTHN, k_BTGN, v_BTGM, positions_BT, segment_ids_BT)
