"""Blocked attention in plain JAX: what no query of a block sees is never computed. The default on CPU.

Rows are cut into blocks of S tokens. A query block sees the key blocks within the pattern's reach; runs of query blocks
with equally long spans are computed as one batched matmul. Global keys are a second, small key set in the same softmax.
The backward pass recomputes the probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv:2307.08691), so
that memory is linear in T; except that choosing learned global keys compares 2 T² / block scores of one number each.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from dsv3_jax.config import LayerPattern, LearnedGlobal, Segmented
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.key_sets import GlobalKeys, find_global_keys, global_mask, has_global_keys
from dsv3_jax.ops.attention import soft_cap
from dsv3_jax.ops.patterns import Place, local_mask, reach, same_document


class Run(NamedTuple):
    """Query blocks first … first + count − 1; block first + i sees key blocks low + i … low + i + length − 1."""

    first: int
    count: int
    low: int
    length: int


def block_size(pattern: LayerPattern, length: int) -> int:
    """Tokens a block: large enough for a matmul, no larger than the window or the row need.

    With no bound on the reach every block is a run of its own, so blocks grow with the row, to keep runs few.
    """
    if isinstance(pattern, Segmented) and pattern.keys == "all":
        return min(pattern.segment, length)
    bound = reach(pattern)
    largest = 128 if bound is not None else min(512, max(128, length // 4))
    block = 16
    while block < largest and block < length and (bound is None or block <= bound):
        block *= 2
    return min(block, pattern.window) if isinstance(pattern, LearnedGlobal) else block


def plan_runs(num_blocks: int, block: int, bound: int | None, causal: bool) -> list[Run]:
    """Splits query blocks into runs of equal span. The visible block pairs are Σ count · length."""
    behind = num_blocks if bound is None else -(-bound // block)
    spans = []
    for i in range(num_blocks):
        low, high = max(0, i - behind), i if causal else min(num_blocks - 1, i + behind)
        spans.append((low - i, high - low + 1))
    runs: list[Run] = []
    for i, (offset, length) in enumerate(spans):
        last = runs[-1] if runs else None
        if last and (last.low - last.first, last.length) == (offset, length):
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(Run(i, 1, i + offset, length))
    return runs


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: one a call
class _Plan:
    """What is static of a call."""

    pattern: LayerPattern
    causal: bool
    scale: float
    softcap: float | None
    max_segments: int
    block: int
    length: int

    def runs(self) -> list[Run]:
        return plan_runs(-(-self.length // self.block), self.block, reach(self.pattern), self.causal)


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
    if run.count == 1:
        x = x_BGnS[:, :, run.low : run.low + run.length]
        return x.reshape(*x.shape[:2], 1, run.length * x.shape[3], *x.shape[4:])
    return jnp.concatenate([x_BGnS[:, :, run.low + j : run.low + j + run.count] for j in range(run.length)], axis=3)


def _add_span(total_BGnSN: jax.Array, span: jax.Array, run: Run) -> jax.Array:
    """The transpose of `_span`: adds each block's share of `span` back."""
    S = total_BGnSN.shape[3]
    if run.count == 1:
        share = span.reshape(*span.shape[:2], run.length, S, -1)
        return total_BGnSN.at[:, :, run.low : run.low + run.length].add(share)
    for j in range(run.length):
        share = span[:, :, :, j * S : (j + 1) * S]
        total_BGnSN = total_BGnSN.at[:, :, run.low + j : run.low + j + run.count].add(share)
    return total_BGnSN


class _Inputs(NamedTuple):
    """What the result depends on; gate_BT (score of each key as a global one) and place are None where unused."""

    q_BTHN: jax.Array
    k_BTGN: jax.Array
    v_BTGM: jax.Array
    gate_BT: jax.Array | None
    place: Place


class _GlobalSet(NamedTuple):
    """Global keys with their contents, and what is added to their scores, if anything."""

    keys: GlobalKeys
    k_BGmPN: jax.Array
    v_BGmPM: jax.Array
    bias_BmP: jax.Array | None


class _Blocks(NamedTuple):
    """Inputs cut into blocks: q, k, v heads first; position, segment and window [B, 1, n, S]; the global key set."""

    q_BGnhSN: jax.Array
    k_BGnSN: jax.Array
    v_BGnSM: jax.Array
    place_B1nS: Place
    far: _GlobalSet | None


def _cut(plan: _Plan, inputs: _Inputs) -> _Blocks:
    q, k, v, gate_BT, place = inputs
    G, block = k.shape[2], plan.block
    blocks = _Blocks(
        _heads_first(q, block, G),
        _heads_first(k, block, G)[:, :, :, 0],
        _heads_first(v, block, G)[:, :, :, 0],
        jax.tree.map(lambda x_BT: _to_blocks(x_BT, block)[:, None], place),
        None,
    )
    if not has_global_keys(plan.pattern):
        return blocks
    keys = find_global_keys(plan.pattern, plan.causal, place, gate_BT, plan.max_segments, block)
    B, m, P = keys.row_BmP.shape

    def pick(x_BTGN):
        picked = jnp.take_along_axis(x_BTGN, keys.row_BmP.reshape(B, m * P, 1, 1), axis=1)
        return jnp.transpose(picked.reshape(B, m, P, *x_BTGN.shape[2:]), (0, 3, 1, 2, 4))

    bias_BmP = None
    if gate_BT is not None:
        bias_BmP = jnp.take_along_axis(jax.nn.log_sigmoid(gate_BT)[:, None], keys.row_BmP, axis=-1)
    return blocks._replace(far=_GlobalSet(keys, pick(k), pick(v), bias_BmP))


class _Scored(NamedTuple):
    """One key set of a run: scores [B, G, count, h, S, keys], −inf where not visible; d scores / d (scaled product);
    keys [B, G, count or 1, keys, N] and values."""

    scores: jax.Array
    slope: jax.Array | None
    keys: jax.Array
    values: jax.Array


def _of_run(x: jax.Array, run: Run, axis: int) -> jax.Array:
    """The run's share of the blocks on `axis`; all of it where there is one for all blocks."""
    return x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, run.first, run.first + run.count, axis=axis)


def _key_sets(plan: _Plan, blocks: _Blocks, run: Run) -> list[_Scored]:
    """The local and then the global key set of a run."""
    at = slice(run.first, run.first + run.count)
    q, q_place = blocks.q_BGnhSN[:, :, at], jax.tree.map(lambda x: x[:, :, at], blocks.place_B1nS)

    def key_set(keys, values, mask, bias=None):
        product = plan.scale * jnp.einsum("BGchSN,BGcKN->BGchSK", q, keys, preferred_element_type=jnp.float32)
        scores = soft_cap(product, plan.softcap)
        slope = None if plan.softcap is None else 1 - jnp.square(scores / plan.softcap)
        scores = scores if bias is None else scores + bias[:, None, :, None, None, :]
        return _Scored(jnp.where(mask[:, :, :, None], scores, -jnp.inf), slope, keys, values)

    k, v, k_position, k_segment = (_span(x, run) for x in (blocks.k_BGnSN, blocks.v_BGnSM, *blocks.place_B1nS[:2]))
    q_window = None if q_place.window_BT is None else q_place.window_BT[..., None]
    local = local_mask(plan.pattern, plan.causal, q_place.position_BT[..., None], k_position[..., None, :], q_window)
    local &= same_document(q_place.segment_BT[..., None], k_segment[..., None, :])
    sets = [key_set(k, v, local)]
    if blocks.far is not None:
        keys = jax.tree.map(lambda x: _of_run(x, run, 1), blocks.far.keys)
        chosen = global_mask(plan.pattern, plan.causal, keys, *(None if x is None else x[:, 0] for x in q_place))
        bias = None if blocks.far.bias_BmP is None else _of_run(blocks.far.bias_BmP, run, 1)
        k, v = (
            jnp.broadcast_to(x, (*x.shape[:2], run.count, *x.shape[3:]))
            for x in (_of_run(blocks.far.k_BGmPN, run, 2), _of_run(blocks.far.v_BGmPM, run, 2))
        )
        sets.append(key_set(k, v, chosen[:, None], bias))
    return sets


def _forward(plan: _Plan, inputs: _Inputs):
    """(out_BTHM, lse_BHT) and what the backward pass keeps of them, in blocks."""
    B, T, H, _ = inputs.q_BTHN.shape
    blocks, dtype = _cut(plan, inputs), inputs.v_BTGM.dtype
    outs, lses = [], []
    for run in plan.runs():
        sets = _key_sets(plan, blocks, run)
        peak = functools.reduce(jnp.maximum, [jnp.max(s.scores, axis=-1, keepdims=True) for s in sets])
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        exps = [jnp.exp(s.scores - peak) for s in sets]
        total = sum(jnp.sum(exp, axis=-1, keepdims=True) for exp in exps)
        out = sum(
            jnp.einsum("BGchSK,BGcKM->BGchSM", exp.astype(dtype), s.values, preferred_element_type=jnp.float32)
            for exp, s in zip(exps, sets, strict=True)
        )
        outs.append(jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0).astype(dtype))
        lses.append((peak + jnp.log(total))[..., 0])
    out_BGnhSM, lse_BGnhS = jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
    if blocks.far is not None and blocks.far.keys.owner_BmP is None:  # one key set for all documents, of a static size
        beyond = (blocks.place_B1nS.segment_BT > plan.max_segments)[:, :, :, None, :, None]
        out_BGnhSM = jnp.where(beyond, jnp.nan, out_BGnhSM).astype(dtype)
    lse_BHT = jnp.moveaxis(lse_BGnhS, 2, 3).reshape(B, H, -1)[..., :T]
    return (_heads_last(out_BGnhSM, T), lse_BHT), (out_BGnhSM, lse_BGnhS)


def _backward(plan: _Plan, saved, cotangents):
    inputs, (out_BGnhSM, lse_BGnhS) = saved
    (q, k, v, gate_BT, _), G = inputs, inputs.k_BTGN.shape[2]
    blocks = _cut(plan, inputs)
    dout_BGnhSM = _heads_first(cotangents[0], plan.block, G)
    dlse_BGnhS = _heads_first(jnp.moveaxis(cotangents[1], 1, 2)[..., None], plan.block, G)[..., 0]
    # d scores = p · (dout · v − Σ dout · out + dlse)
    delta_BGnhS = jnp.sum(dout_BGnhSM.astype(jnp.float32) * out_BGnhSM.astype(jnp.float32), axis=-1) - dlse_BGnhS
    lse_BGnhS = jnp.where(jnp.isfinite(lse_BGnhS), lse_BGnhS, 0)
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (blocks.k_BGnSN, blocks.v_BGnSM))
    dqs: list[Any] = []
    globals_: list[Any] = []
    for run in plan.runs():
        at = slice(run.first, run.first + run.count)
        q_run, dout_run, dq, grads = blocks.q_BGnhSN[:, :, at], dout_BGnhSM[:, :, at], 0.0, []
        for scored in _key_sets(plan, blocks, run):
            p = jnp.exp(scored.scores - lse_BGnhS[:, :, at, ..., None])
            dp = jnp.einsum("BGchSM,BGcKM->BGchSK", dout_run, scored.values, preferred_element_type=jnp.float32)
            dscores = p * (dp - delta_BGnhS[:, :, at, ..., None])
            dproduct = dscores if scored.slope is None else dscores * scored.slope
            ds, p = (dproduct * plan.scale).astype(q.dtype), p.astype(q.dtype)
            dq += jnp.einsum("BGchSK,BGcKN->BGchSN", ds, scored.keys, preferred_element_type=jnp.float32)
            dkeys = jnp.einsum("BGchSK,BGchSN->BGcKN", ds, q_run, preferred_element_type=jnp.float32)
            dvalues = jnp.einsum("BGchSK,BGchSM->BGcKM", p, dout_run, preferred_element_type=jnp.float32)
            grads.append((dkeys, dvalues, jnp.sum(dscores, axis=(1, 3, 4))))
        dqs.append(dq)
        dk, dv = _add_span(dk, grads[0][0], run), _add_span(dv, grads[0][1], run)
        globals_ += grads[1:]
    dq_BTHN = _heads_last(jnp.concatenate(dqs, axis=2), plan.length)
    dk_BTGN, dv_BTGM = (_heads_last(x[:, :, :, None], plan.length) for x in (dk, dv))
    dgate_BT = None
    if blocks.far is not None:
        dk_BTGN, dv_BTGM, dbias_BT = _add_global(blocks.far.keys, globals_, dk_BTGN, dv_BTGM)
        if gate_BT is not None:
            dgate_BT = dbias_BT * jax.nn.sigmoid(-gate_BT)  # of log-sigmoid
    dinputs = (dq_BTHN.astype(q.dtype), dk_BTGN.astype(k.dtype), dv_BTGM.astype(v.dtype), dgate_BT, None)
    return (_Inputs(*cast(Any, dinputs)),)


def _add_global(keys: GlobalKeys, grads: list[Any], dk_BTGN: jax.Array, dv_BTGM: jax.Array):
    """dk and dv with the global keys' share scattered back, and the gradient of each key's bias [B, T]."""
    B, m, P = keys.row_BmP.shape

    def gather(parts, axis):
        """Of all blocks; summed over them where the keys are one set for all."""
        whole = jnp.concatenate(parts, axis=axis)
        return jnp.sum(whole, axis=axis, keepdims=True) if m == 1 else whole

    index = (jnp.arange(B)[:, None], keys.row_BmP.reshape(B, -1))

    def scatter(total_BTGN, parts):
        share_BmPGN = jnp.moveaxis(gather(parts, 2), 1, 3)
        return total_BTGN.at[index].add(share_BmPGN.reshape(B, m * P, *total_BTGN.shape[2:]))

    dk, dv, dbias = zip(*grads, strict=True)
    dbias_BT = jnp.zeros(dk_BTGN.shape[:2]).at[index].add(gather(dbias, 1).reshape(B, -1))
    return scatter(dk_BTGN, dk), scatter(dv_BTGM, dv), dbias_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    return _forward(plan, inputs)[0]


def _attend_forward(plan: _Plan, inputs: _Inputs):
    result, kept = _forward(plan, inputs)
    return result, (inputs, kept)


_attend.defvjp(_attend_forward, _backward)


def blocked_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`."""
    T = call.q_BTHN.shape[1]
    block = block_size(call.pattern, T)
    plan = _Plan(call.pattern, call.causal, call.scale, call.softcap, call.max_segments, block, T)
    return _attend(plan, _Inputs(call.q_BTHN, call.k_BTGN, call.v_BTGM, call.gate_BT, call.place))
