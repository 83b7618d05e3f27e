"""Blocked attention in plain JAX: what no query of a block sees is never computed. The default on CPU.

Rows are cut into blocks of S tokens. Query block i sees key blocks i − reach … i, where reach follows from the pattern's
look-back; runs of query blocks with equally long spans are computed as one batched matmul. Global positions are a
second, small key set in the same softmax. The backward pass recomputes the probabilities from the log-sum-exp
(FlashAttention-2, Dao 2023, arXiv:2307.08691), so that memory is linear in T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Pattern
from dsv3_jax.ops.patterns import global_mask, global_positions, local_mask, lookback, same_document

MAX_BLOCK = 128


class Run(NamedTuple):
    """Query blocks first … first + count − 1, each of which sees its `length` last key blocks, itself included."""

    first: int
    count: int
    length: int


def block_size(length: int, reach: int | None) -> int:
    """Tokens a block: large enough for a matmul, no larger than the window or the row need."""
    block = 16
    while block < MAX_BLOCK and block < length and (reach is None or block <= reach):
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
    padding = -T % block
    x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * len(rest))
    return x_BT.reshape(B, (T + padding) // block, block, *rest)


def _span(x_BnS: jax.Array, run: Run) -> jax.Array:
    """Each query block's keys: [..., B, blocks, S, ...] on axes 1, 2 -> [B, count, length · S, ...]."""
    low = run.first - run.length + 1
    shifted = [x_BnS[:, low + j : low + j + run.count] for j in range(run.length)]
    stacked = jnp.stack(shifted, axis=2)
    return stacked.reshape(*stacked.shape[:2], run.length * x_BnS.shape[2], *x_BnS.shape[3:])


def _add_span(total_BnS: jax.Array, span: jax.Array, run: Run) -> jax.Array:
    """The transpose of `_span`: adds each block's share of `span` back."""
    low, S = run.first - run.length + 1, total_BnS.shape[2]
    for j in range(run.length):
        block = span[:, :, j * S : (j + 1) * S]
        total_BnS = total_BnS.at[:, low + j : low + j + run.count].add(block)
    return total_BnS


def _global_rows(pattern: Pattern, segments_BT: jax.Array, max_segments: int) -> tuple[jax.Array, ...]:
    """Row index, position and segment [B, P] of every document's global keys; segment −1 where there is none."""
    offsets = jnp.asarray(global_positions(pattern), jnp.int32)
    ids = jnp.arange(1, max_segments + 1)
    start_Bs = jnp.argmax(segments_BT[:, None, :] == ids[:, None], axis=-1)
    rows_BP = (start_Bs[..., None] + offsets).reshape(segments_BT.shape[0], -1)
    wanted_P = jnp.repeat(ids, len(offsets))
    clipped_BP = jnp.minimum(rows_BP, segments_BT.shape[1] - 1)
    found = (rows_BP == clipped_BP) & (jnp.take_along_axis(segments_BT, clipped_BP, axis=1) == wanted_P)
    return clipped_BP, jnp.tile(offsets, max_segments)[None], jnp.where(found, wanted_P, -1)


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
    B, T, H, N = q_BTHN.shape
    G, M = k_BTGN.shape[2], v_BTGM.shape[3]
    reach = lookback(pattern)
    block = block_size(T, reach)
    has_globals = bool(global_positions(pattern))

    def masked(scores, q_position, q_segment, k_position, k_segment, allowed):
        mask = allowed(pattern, q_position[..., None], k_position[..., None, :])
        mask &= same_document(q_segment[..., None], k_segment[..., None, :])
        return jnp.where(mask[:, :, None, None], scores, -jnp.inf)

    def scores_of(run, q_BcSGhN, k_BnSGN, k_global_BPGN, positions_BnS, segments_BnS, global_rows):
        """Scores [B, count, G, h, S, keys] over the span, then over the global set; −inf where not visible."""
        rows = slice(run.first, run.first + run.count)
        q_position, q_segment = positions_BnS[:, rows], segments_BnS[:, rows]
        local = jnp.einsum("BcSGhN,BcKGN->BcGhSK", q_BcSGhN, _span(k_BnSGN, run), preferred_element_type=jnp.float32)
        k_position, k_segment = _span(positions_BnS, run), _span(segments_BnS, run)
        result = [masked(local * scale, q_position, q_segment, k_position, k_segment, local_mask)]
        if has_globals:
            _, k_position, k_segment = (x[:, None] for x in global_rows)
            far = jnp.einsum("BcSGhN,BPGN->BcGhSP", q_BcSGhN, k_global_BPGN, preferred_element_type=jnp.float32)
            result.append(masked(far * scale, q_position, q_segment, k_position, k_segment, global_mask))
        return result

    def prepare(q, k, v, positions, segments):
        blocks = [_to_blocks(x, block) for x in (q.reshape(B, T, G, H // G, N), k, v, positions, segments)]
        rows = _global_rows(pattern, segments, max_segments) if has_globals else None
        pick = [jnp.take_along_axis(x, rows[0][..., None, None], axis=1) if rows else x[:, :0] for x in (k, v)]
        return *blocks, *pick, rows

    def forward(q, k, v, positions, segments):
        q_BnSGhN, k_BnSGN, v_BnSGM, positions_BnS, segments_BnS, k_global, v_global, rows = prepare(
            q, k, v, positions, segments
        )
        outs, lses = [], []
        for run in plan_runs(k_BnSGN.shape[1], block, reach):
            q_run = q_BnSGhN[:, run.first : run.first + run.count]
            parts = scores_of(run, q_run, k_BnSGN, k_global, positions_BnS, segments_BnS, rows)
            peak = jnp.max(parts[0], axis=-1, keepdims=True)
            for part in parts[1:]:
                peak = jnp.maximum(peak, jnp.max(part, axis=-1, keepdims=True))
            peak = jnp.where(jnp.isfinite(peak), peak, 0)
            exps = [jnp.exp(part - peak) for part in parts]
            total = sum(jnp.sum(exp, axis=-1, keepdims=True) for exp in exps)
            inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
            values = [("BcGhSK,BcKGM->BcSGhM", _span(v_BnSGM, run)), ("BcGhSK,BKGM->BcSGhM", v_global)]
            out = sum(
                jnp.einsum(equation, (exp * inverse).astype(v.dtype), value, preferred_element_type=jnp.float32)
                for exp, (equation, value) in zip(exps, values, strict=False)
            )
            outs.append(out.astype(v.dtype))
            lses.append((peak + jnp.log(total))[..., 0])
        out_BTHM = jnp.concatenate(outs, axis=1).reshape(B, -1, H, M)[:, :T]
        lse_BnGhS = jnp.concatenate(lses, axis=1)
        if has_globals:
            out_BTHM = jnp.where((segments > max_segments)[..., None, None], jnp.nan, out_BTHM).astype(v.dtype)
        return out_BTHM, lse_BnGhS

    def to_BHT(lse_BnGhS):
        return jnp.moveaxis(lse_BnGhS, 1, 3).reshape(B, H, -1)[..., :T]

    @jax.custom_vjp
    def attend(q, k, v, positions, segments):
        out, lse = forward(q, k, v, positions, segments)
        return out, to_BHT(lse)

    def attend_forward(q, k, v, positions, segments):
        out, lse = forward(q, k, v, positions, segments)
        return (out, to_BHT(lse)), (q, k, v, positions, segments, out, lse)

    def attend_backward(saved, cotangents):
        q, k, v, positions, segments, out, lse_BnGhS = saved
        dout_BTHM, dlse_BHT = cotangents
        q_BnSGhN, k_BnSGN, v_BnSGM, positions_BnS, segments_BnS, k_global, v_global, rows = prepare(
            q, k, v, positions, segments
        )
        dout_BnSGhM = _to_blocks(dout_BTHM.reshape(B, T, G, H // G, M), block)
        # d scores = p · (dout · v − Σ dout · out + dlse)
        delta_BTH = jnp.sum(dout_BTHM.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        delta_BnSGh = _to_blocks((delta_BTH - jnp.moveaxis(dlse_BHT, 1, 2)).reshape(B, T, G, H // G), block)
        delta_BnGhS = jnp.moveaxis(delta_BnSGh, 2, 4)
        lse_BnGhS = jnp.where(jnp.isfinite(lse_BnGhS), lse_BnGhS, 0)
        dk, dv = jnp.zeros(k_BnSGN.shape, jnp.float32), jnp.zeros(v_BnSGM.shape, jnp.float32)
        dk_global, dv_global = jnp.zeros(k_global.shape, jnp.float32), jnp.zeros(v_global.shape, jnp.float32)
        dqs = []
        for run in plan_runs(k_BnSGN.shape[1], block, reach):
            at = slice(run.first, run.first + run.count)
            q_run, dout_run = q_BnSGhN[:, at], dout_BnSGhM[:, at]
            parts = scores_of(run, q_run, k_BnSGN, k_global, positions_BnS, segments_BnS, rows)
            key_sets = [(_span(k_BnSGN, run), _span(v_BnSGM, run), "BcK"), (k_global, v_global, "BK")]
            dq = jnp.zeros(q_run.shape, jnp.float32)
            for index, (part, (keys, values, axes)) in enumerate(zip(parts, key_sets, strict=False)):
                p = jnp.exp(part - lse_BnGhS[:, at, ..., None])
                dp = jnp.einsum(f"BcSGhM,{axes}GM->BcGhSK", dout_run, values, preferred_element_type=jnp.float32)
                ds = (p * (dp - delta_BnGhS[:, at, ..., None]) * scale).astype(q.dtype)
                p = p.astype(q.dtype)
                dq += jnp.einsum(f"BcGhSK,{axes}GN->BcSGhN", ds, keys, preferred_element_type=jnp.float32)
                dkeys = jnp.einsum(f"BcGhSK,BcSGhN->{axes}GN", ds, q_run, preferred_element_type=jnp.float32)
                dvalues = jnp.einsum(f"BcGhSK,BcSGhM->{axes}GM", p, dout_run, preferred_element_type=jnp.float32)
                if index == 0:
                    dk, dv = _add_span(dk, dkeys, run), _add_span(dv, dvalues, run)
                else:
                    dk_global, dv_global = dk_global + dkeys, dv_global + dvalues
            dqs.append(dq)
        dq_BTHN = jnp.concatenate(dqs, axis=1).reshape(B, -1, H, N)[:, :T]
        dk_BTGN, dv_BTGM = dk.reshape(B, -1, G, N)[:, :T], dv.reshape(B, -1, G, M)[:, :T]
        if rows:
            batch = jnp.arange(B)[:, None]
            dk_BTGN, dv_BTGM = dk_BTGN.at[batch, rows[0]].add(dk_global), dv_BTGM.at[batch, rows[0]].add(dv_global)
        return dq_BTHN.astype(q.dtype), dk_BTGN.astype(k.dtype), dv_BTGM.astype(v.dtype), None, None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_BTHN, k_BTGN, v_BTGM, positions_BT, segment_ids_BT)
