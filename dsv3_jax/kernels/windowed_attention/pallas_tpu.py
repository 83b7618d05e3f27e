"""Attention by pattern on TPU: Pallas kernels in the manner of FlashAttention-2 (Dao 2023, arXiv:2307.08691).

Scores are kept transposed, keys down and queries across: what belongs to a query (its interval, the running maximum
and sum, log-sum-exp, delta) is then a row vector along the lanes, maxima and sums over keys go down the sublanes and
need no exchange between lanes. The output is accumulated transposed too, and turned once for each query block.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.config import ConfigError, LayerPattern
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.global_set import attend_with_globals
from dsv3_jax.kernels.windowed_attention.intervals import (
    LOWER,
    MASKED,
    SKIPPED,
    UPPER,
    WHOLE,
    Schedule,
    block_pairs,
    schedule_by_key,
    schedule_by_query,
    visible_interval,
)
from dsv3_jax.ops.patterns import reach

LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the score of a key that is not seen: its exponential is 0 beside LOWEST too
LANES = 128
LARGEST_BLOCK = 2**19  # bytes of keys or values: of six such blocks, twice each, the kernels' memory is full
SCALAR_MEMORY = 2**20  # bytes, of every TPU so far


class Blocks(NamedTuple):
    """Tokens of a query block, of a key block, and of the chunks of keys that are worked on at a time."""

    query: int
    key: int
    chunk: int


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: one a call
class _Settings:
    """What is static of a call. log2(e) · scale turns products into exponents of 2; with a soft-cap log2(e) alone."""

    scale: float
    softcap: float | None
    q_block: int
    k_block: int
    chunk: int  # keys that are worked on at a time
    pairs_S2: np.ndarray  # of blocks
    interpret: bool

    @property
    def exponent(self) -> float:
        """By which scores are multiplied before 2 is raised to them."""
        return math.log2(math.e) * (self.scale if self.softcap is None else 1.0)

    @property
    def unit(self) -> float:
        """Natural logarithm of e^score for a score of 1."""
        return self.scale if self.softcap is None else 1.0


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one dimension of each, in float32; float32 inputs at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(settings: _Settings, q_SN: jax.Array, k_KN: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores [K, S] in `settings.unit`, and d score / d (scaled product) with a soft-cap."""
    product_KS = _product(k_KN, q_SN, (1, 1))
    if settings.softcap is None:
        return product_KS, None
    bounded_KS = jnp.tanh(product_KS * (settings.scale / settings.softcap))
    return settings.softcap * bounded_KS, 1 - jnp.square(bounded_KS)


class _Piece(NamedTuple):
    """What is worked on at a time: a chunk of the key block, and the queries that may see it."""

    keys: slice
    queries: slice

    def of(self, row_ref: Any) -> jax.Array:
        """The queries' part of a row vector [1, S]."""
        return row_ref[:, self.queries]


def _pieces(settings: _Settings, kind: int) -> list[_Piece]:
    pieces = []
    for start in range(0, settings.k_block, settings.chunk):
        stop = start + settings.chunk
        queries = {LOWER: slice(start, settings.q_block), UPPER: slice(0, stop)}.get(kind, slice(0, settings.q_block))
        pieces.append(_Piece(slice(start, stop), queries))
    return pieces


def _ahead(settings: _Settings, kind: int, issue: Any) -> Iterator[tuple[_Piece, Any]]:
    """(piece, issue(piece)) for each piece of a pair of blocks, each issued before the one before it is worked on, so
    that the matrix unit is busy while the vector unit exponentiates."""
    pieces = _pieces(settings, kind)
    following = issue(pieces[0])
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        issued, following = following, None if after is None else issue(after)
        yield piece, issued


def _hidden(piece: _Piece, first_ref: Any, last_ref: Any, start: Any) -> jax.Array:
    """Which keys of a piece each query does not see, bool [K, S]. start: the row of the block's first key."""
    first_1S, last_1S = piece.of(first_ref), piece.of(last_ref)
    shape = (piece.keys.stop - piece.keys.start, first_1S.shape[1])
    key_KS = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (start + piece.keys.start)
    return (key_KS < first_1S) | (key_KS > last_1S)


def _at(schedule_refs: Any, num_steps: int) -> tuple[Any, Any, Any, Any, Any]:
    """Of this step: owner, other block, kind, and whether it is the first and the last of its owner."""
    owner_ref, other_ref, _, kind_ref = schedule_refs
    batch, step, member = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    owner = owner_ref[step]
    first = (step == 0) | (owner_ref[jnp.maximum(step - 1, 0)] != owner)
    last = (step == num_steps - 1) | (owner_ref[jnp.minimum(step + 1, num_steps - 1)] != owner)
    first, last = first & (member == 0), last & (member == pl.num_programs(3) - 1)
    return owner, other_ref[step], kind_ref[batch * num_steps + step], first, last


def _on_kind(settings: _Settings, kind: Any, body: Any) -> None:
    """body(kind) for a pair of blocks that see each other."""
    kinds = (WHOLE, MASKED, LOWER, UPPER) if settings.q_block == settings.k_block > settings.chunk else (WHOLE, MASKED)
    for each in kinds:
        pl.when(kind == each)(functools.partial(body, each))


def _forward_kernel(
    settings: _Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, vt_ref, first_ref, last_ref, out_ref, lse_ref, peak_ref, total_ref, acc_ref,
):  # fmt: skip
    _, key_block, kind, is_first, is_last = _at((owner_ref, other_ref, fetch_ref, kind_ref), num_steps)

    @pl.when(is_first)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(kind: int) -> None:
        def issue(piece: _Piece) -> jax.Array:
            return _scores(settings, q_ref[piece.queries], k_ref[piece.keys])[0]

        for piece, scores_KS in _ahead(settings, kind, issue):
            if kind != WHOLE:
                hidden_KS = _hidden(piece, first_ref, last_ref, key_block * settings.k_block)
                scores_KS = jnp.where(hidden_KS, HIDDEN, scores_KS)
            old_1S = piece.of(peak_ref)
            peak_1S = jnp.maximum(old_1S, jnp.max(scores_KS, axis=0, keepdims=True))
            exp_KS = jnp.exp2((scores_KS - peak_1S) * settings.exponent)
            shrink_1S = jnp.exp2((old_1S - peak_1S) * settings.exponent)
            out_MS = _product(vt_ref[:, piece.keys], exp_KS.astype(vt_ref.dtype), (1, 0))
            peak_ref[:, piece.queries] = peak_1S
            total_ref[:, piece.queries] = piece.of(total_ref) * shrink_1S + jnp.sum(exp_KS, axis=0, keepdims=True)
            acc_ref[:, piece.queries] = piece.of(acc_ref) * shrink_1S + out_MS

    _on_kind(settings, kind, body)

    @pl.when(is_last)
    def _():
        total_1S = total_ref[...]
        some_1S = total_1S > 0
        safe_1S = jnp.where(some_1S, total_1S, 1.0)
        out_ref[...] = jnp.transpose(acc_ref[...] / safe_1S).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some_1S, peak_ref[...] + jnp.log(safe_1S) / settings.unit, -jnp.inf)


def _gradients(
    settings: _Settings, kind: int, start: Any, q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref
) -> Iterator[tuple[_Piece, jax.Array, jax.Array]]:
    """(piece, weights [K, S], d loss / d (scaled product) [K, S]) for each piece of a pair of blocks.

    weights = exp(score − lse), and dscores = weights · (v · dout − delta), times the slope of the soft-cap.
    """

    def issue(piece: _Piece) -> Any:
        scores = _scores(settings, q_ref[piece.queries], k_ref[piece.keys])
        return *scores, _product(v_ref[piece.keys], dout_ref[piece.queries], (1, 1))

    for piece, (scores_KS, slope_KS, dweights_KS) in _ahead(settings, kind, issue):
        # lse is +inf where a query sees nothing: all its weights are 0
        weights_KS = jnp.exp2((scores_KS - piece.of(lse_ref)) * settings.exponent)  # the difference of large ones first
        if kind != WHOLE:
            weights_KS = jnp.where(_hidden(piece, first_ref, last_ref, start), 0.0, weights_KS)
        dscores_KS = weights_KS * (dweights_KS - piece.of(delta_ref))
        yield piece, weights_KS, dscores_KS if slope_KS is None else dscores_KS * slope_KS


def _dq_kernel(
    settings: _Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, kt_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, dq_ref, acc_ref,
):  # fmt: skip
    _, key_block, kind, is_first, is_last = _at((owner_ref, other_ref, fetch_ref, kind_ref), num_steps)
    refs = q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref

    @pl.when(is_first)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(kind: int) -> None:
        for piece, _, dscores_KS in _gradients(settings, kind, key_block * settings.k_block, *refs):
            acc_ref[:, piece.queries] += _product(kt_ref[:, piece.keys], dscores_KS.astype(kt_ref.dtype), (1, 0))

    _on_kind(settings, kind, body)

    @pl.when(is_last)
    def _():
        dq_ref[...] = jnp.transpose(acc_ref[...] * settings.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    settings: _Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref,
):  # fmt: skip
    key_block, _, kind, is_first, is_last = _at((owner_ref, other_ref, fetch_ref, kind_ref), num_steps)
    refs = q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref

    @pl.when(is_first)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def body(kind: int) -> None:
        for piece, weights_KS, dscores_KS in _gradients(settings, kind, key_block * settings.k_block, *refs):
            dv_acc_ref[piece.keys] += _product(weights_KS.astype(dout_ref.dtype), dout_ref[piece.queries], (1, 0))
            dk_acc_ref[piece.keys] += _product(dscores_KS.astype(q_ref.dtype), q_ref[piece.queries], (1, 0))

    _on_kind(settings, kind, body)

    @pl.when(is_last)
    def _():
        dk_ref[...] = (dk_acc_ref[...] * settings.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


class _Specs:
    """Which block of an array is in memory at a step of the grid (B, heads, steps, members).

    Arrays are [B, heads, T, width], of queries or of keys. Blocks of the owners follow the steps, others are fetched.
    by_key: keys own, the grid's heads are theirs, and its members the query heads of each; else there is one member.
    """

    def __init__(self, settings: _Settings, schedule: Schedule, group: int, by_key: bool):
        self.settings, self.num_steps = settings, schedule.kind_BS.shape[1]
        self.members = group if by_key else 1
        self._group, self._by_key = group, by_key

    def _place(self, of_query: bool, b, h, s, j, owner_ref, fetch_ref, kind_ref):
        """Head and block."""
        if of_query != self._by_key:  # the owner
            return h, owner_ref[s]
        step = b * self.num_steps + s
        if not self._by_key:
            return jax.lax.div(h, self._group), fetch_ref[step]
        member = jnp.where(kind_ref[step] == SKIPPED, self._group - 1, j)  # what the step before had last
        return h * self._group + member, fetch_ref[step]

    def _block(self, of_query: bool) -> int:
        return self.settings.q_block if of_query else self.settings.k_block

    def rows(self, of_query: bool, width: int) -> pl.BlockSpec:
        """[block, width] of [B, heads, T, width]."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref):
            head, block = self._place(of_query, b, h, s, j, owner_ref, fetch_ref, kind_ref)
            return b, head, block, 0

        return pl.BlockSpec((None, None, self._block(of_query), width), index)

    def columns(self, of_query: bool, width: int) -> pl.BlockSpec:
        """[width, block] of [B, heads, width, T]."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref):
            head, block = self._place(of_query, b, h, s, j, owner_ref, fetch_ref, kind_ref)
            return b, head, 0, block

        return pl.BlockSpec((None, None, width, self._block(of_query)), index)

    def interval(self) -> pl.BlockSpec:
        """[1, block] of [B, 1, T], of queries, for all heads."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref):
            return b, 0, self._place(True, b, h, s, j, owner_ref, fetch_ref, kind_ref)[1]

        return pl.BlockSpec((None, 1, self._block(True)), index)


def _call(
    kernel: Any, specs: _Specs, schedule: Schedule, heads: int, inputs: Any, outputs: Any, scratch: Any, flops: int
):
    """Runs a kernel over the grid (B, heads, steps, members).

    inputs: (array, spec) of each. outputs: (shape, dtype, spec) of each. scratch: shapes, float32. flops: of one step.
    """
    settings, (B, num_steps) = specs.settings, schedule.kind_BS.shape
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(B, heads, num_steps, specs.members),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, _, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    steps, pair = B * heads * num_steps * specs.members, settings.q_block * settings.k_block
    loaded = sum(math.prod(d for d in spec.block_shape if d) * x.dtype.itemsize for x, spec in inputs)
    written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in outputs)
    run = pl.pallas_call(
        functools.partial(kernel, settings, num_steps),
        [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(steps * flops, steps * pair, steps * loaded + written),
        interpret=settings.interpret,
        name=kernel.__name__.strip("_"),
    )
    plan = (schedule.owner_S, schedule.other_S, schedule.fetch_BS.reshape(-1), schedule.kind_BS.reshape(-1))
    if (needed := sum(x.size for x in plan) * 4) > SCALAR_MEMORY * 0.9:
        raise ConfigError(
            f"config.model.attention.implementation='pallas_tpu': the schedule of {B} rows a device with {num_steps} "
            f"steps needs {needed:,} bytes of scalar memory, a TPU has {SCALAR_MEMORY:,}; use fewer rows a device, a "
            "shorter sequence, a window, or implementation='blocked'"
        )
    return run(*plan, *(x for x, _ in inputs))


def _run_forward(settings: _Settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    """out_BHTM, and lse_BH1T in `settings.unit`: exactly the largest score where that is all there is."""
    (B, H, T, N), (G, M) = q_BHTN.shape, (v_BGTM.shape[1], v_BGTM.shape[3])
    S, K = settings.q_block, settings.k_block
    schedule = schedule_by_query(settings.pairs_S2, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, schedule, H // G, by_key=False)
    return _call(
        _forward_kernel,
        specs,
        schedule,
        H,
        [
            (q_BHTN, specs.rows(True, N)),
            (k_BGTN, specs.rows(False, N)),
            (jnp.swapaxes(v_BGTM, 2, 3), specs.columns(False, M)),
            (first_BT[:, None], specs.interval()),
            (last_BT[:, None], specs.interval()),
        ],
        [
            ((B, H, T, M), v_BGTM.dtype, specs.rows(True, M)),
            ((B, H, 1, T), jnp.float32, specs.columns(True, 1)),
        ],
        [(1, S), (1, S), (M, S)],
        2 * S * K * (N + M),
    )


def _run_backward(settings: _Settings, saved: Any, cotangents: Any):
    q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT, out_BHTM, lse_BH1T = saved
    dout_BHTM, dlse_BH1T = cotangents
    (B, H, T, N), (G, M), group = q_BHTN.shape, (v_BGTM.shape[1], v_BGTM.shape[3]), q_BHTN.shape[1] // v_BGTM.shape[1]
    S, K, pairs = settings.q_block, settings.k_block, settings.pairs_S2
    # d scores = weights · (dout · v − Σ dout · out + dlse)
    delta_BHT = jnp.sum(dout_BHTM.astype(jnp.float32) * out_BHTM.astype(jnp.float32), axis=-1)
    delta_BH1T = delta_BHT[:, :, None] - dlse_BH1T
    lse_BH1T = jnp.where(jnp.isfinite(lse_BH1T), lse_BH1T, jnp.inf)

    def inputs(specs: _Specs, *more: Any) -> list[Any]:
        return [
            (q_BHTN, specs.rows(True, N)),
            (k_BGTN, specs.rows(False, N)),
            *more,
            (v_BGTM, specs.rows(False, M)),
            (first_BT[:, None], specs.interval()),
            (last_BT[:, None], specs.interval()),
            (dout_BHTM, specs.rows(True, M)),
            (lse_BH1T, specs.columns(True, 1)),
            (delta_BH1T, specs.columns(True, 1)),
        ]

    schedule = schedule_by_query(pairs, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, schedule, group, by_key=False)
    (dq_BHTN,) = _call(
        _dq_kernel,
        specs,
        schedule,
        H,
        inputs(specs, (jnp.swapaxes(k_BGTN, 2, 3), specs.columns(False, N))),
        [((B, H, T, N), q_BHTN.dtype, specs.rows(True, N))],
        [(N, S)],
        2 * S * K * (2 * N + M),
    )
    schedule = schedule_by_key(pairs, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, schedule, group, by_key=True)
    dk_BGTN, dv_BGTM = _call(
        _dkv_kernel,
        specs,
        schedule,
        G,
        inputs(specs),
        [
            ((B, G, T, N), k_BGTN.dtype, specs.rows(False, N)),
            ((B, G, T, M), v_BGTM.dtype, specs.rows(False, M)),
        ],
        [(K, N), (K, M)],
        2 * S * K * (2 * N + 2 * M),
    )
    return dq_BHTN, dk_BGTN, dv_BGTM, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT)[0]


def _attend_forward(settings: _Settings, *inputs):
    out, lse = _run_forward(settings, *inputs)
    return (out, lse * settings.unit), (*inputs, out, lse)


_attend.defvjp(_attend_forward, _run_backward)


def block_sizes(pattern: LayerPattern, length: int, width_bytes: int = 256) -> Blocks:
    """Blocks as large as the reach, between 256 and 1024 tokens, where memory on the chip allows; chunks of 128.
    `width_bytes`: of a key or a value, the wider one.

    By the bundles that the compiler schedules, times trips, for v5p and v6e (docs/results/tpu_static.md). With a window
    of 512, blocks of 512 take two thirds of what blocks of 256 take; with 4096, blocks of 1024 three quarters to nine
    tenths of what blocks of 512 take. Chunks of 256 are no better, but for the dq kernel on v6e, by a tenth.
    """
    bound = reach(pattern)
    size = 1024 if bound is None else min(1024, max(256, 1 << bound.bit_length()))
    while size > 256 and size * width_bytes > LARGEST_BLOCK:
        size //= 2
    count = -(-length // size)  # of equal blocks, so that little is padded
    size = -(-length // (count * LANES)) * LANES
    return Blocks(size, size, LANES)


def tpu_attention(
    call: Call, *, blocks: Blocks | None = None, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`.

    Args:
      blocks: multiples of 128; by default `block_sizes`.
      interpret: runs the kernels without a TPU, slowly; by default wherever there is none.
    """

    def local(call: Call):
        q_BTHN, k_BTGN, v_BTGM, place, pattern = call[:5]
        T = q_BTHN.shape[1]
        width_bytes = max(q_BTHN.shape[3], v_BTGM.shape[3]) * q_BTHN.dtype.itemsize
        q_block, k_block, chunk = blocks or block_sizes(pattern, T, width_bytes)
        if k_block % chunk or q_block % LANES or chunk % LANES:
            raise ValueError(f"blocks={blocks}: must be multiples of {LANES}, the key block one of the chunk")
        padding = -T % math.lcm(q_block, k_block)
        pairs_S2 = block_pairs(pattern, call.causal, T, q_block, k_block)
        interpreted = jax.default_backend() != "tpu" if interpret is None else interpret
        settings = _Settings(call.scale, call.softcap, q_block, k_block, chunk, pairs_S2, interpreted)
        first_BT, last_BT = visible_interval(pattern, call.causal, place)

        def heads_first(x_BTHN: jax.Array) -> jax.Array:
            return jnp.pad(jnp.swapaxes(x_BTHN, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

        first_BT = jnp.pad(first_BT, ((0, 0), (0, padding)), constant_values=T)
        last_BT = jnp.pad(last_BT, ((0, 0), (0, padding)), constant_values=-1)
        given = heads_first(q_BTHN), heads_first(k_BTGN), heads_first(v_BTGM), first_BT, last_BT
        out_BHTM, lse_BH1T = cast(tuple[jax.Array, jax.Array], _attend(settings, *given))
        return jnp.swapaxes(out_BHTM, 1, 2)[:, :T], lse_BH1T[:, :, 0, :T]

    return attend_with_globals(local, call)
