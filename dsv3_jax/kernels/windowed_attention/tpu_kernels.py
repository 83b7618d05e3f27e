"""The TPU kernels of attention by pattern: what one step of their grids computes.

Scores are kept transposed, keys down and queries across: what belongs to a query (its interval, the running maximum
and sum, log-sum-exp, delta) is then a row vector along the lanes, maxima and sums over keys go down the sublanes and
need no exchange between lanes. The output and the gradients of queries are accumulated transposed too, and turned once
for each query block.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from dsv3_jax.kernels.windowed_attention.intervals import LOWER, MASKED, UPPER, WHOLE

LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the score of a key that is not seen: its exponential is 0 beside LOWEST too
AHEAD = 3  # pieces whose products are issued before a piece is worked on (docs/results/tpu_static.md)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: one a call
class Settings:
    """What is static of a call. log2(e) · scale turns products into exponents of 2; with a soft-cap log2(e) alone."""

    scale: float
    softcap: float | None
    q_block: int
    k_block: int
    chunk: int  # keys that are worked on at a time
    pairs_S2: np.ndarray  # of blocks
    waiting: int  # bytes of gradients of queries that may wait on the chip
    interpret: Any  # as `pl.pallas_call` takes it

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


def _scores(settings: Settings, q_SN: jax.Array, k_KN: jax.Array) -> tuple[jax.Array, jax.Array | None]:
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


def _pieces(settings: Settings, kind: int) -> list[_Piece]:
    pieces = []
    for start in range(0, settings.k_block, settings.chunk):
        stop = start + settings.chunk
        queries = {LOWER: slice(start, settings.q_block), UPPER: slice(0, stop)}.get(kind, slice(0, settings.q_block))
        pieces.append(_Piece(slice(start, stop), queries))
    return pieces


def _ahead(settings: Settings, kind: int, issue: Any) -> Iterator[tuple[_Piece, Any]]:
    """(piece, issue(piece)) for each piece of a pair of blocks, each issued before those before it are worked on, so
    that the matrix unit is busy while the vector unit exponentiates."""
    pieces = _pieces(settings, kind)
    issued = collections.deque(map(issue, pieces[:AHEAD]))
    for index, piece in enumerate(pieces):
        issued.extend(map(issue, pieces[index + AHEAD : index + AHEAD + 1]))
        yield piece, issued.popleft()


def _hidden(piece: _Piece, first_ref: Any, last_ref: Any, start: Any) -> jax.Array:
    """Which keys of a piece each query does not see, bool [K, S]. start: the row of the block's first key."""
    first_1S, last_1S = piece.of(first_ref), piece.of(last_ref)
    shape = (piece.keys.stop - piece.keys.start, first_1S.shape[1])
    key_KS = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (start + piece.keys.start)
    return (key_KS < first_1S) | (key_KS > last_1S)


def rises(block_ref: Any, num_steps: int, step: Any) -> Any:
    """Whether a row of blocks, one a step, rises from the step before to this one; at both ends it does."""
    before, here = block_ref[jnp.maximum(step - 1, 0)], block_ref[jnp.minimum(step, num_steps - 1)]
    return (step == 0) | (step == num_steps) | (before != here)


def _at(schedule_refs: Any, num_steps: int) -> tuple[Any, Any, Any, Any, Any]:
    """Of this step: owner, other block, kind, and whether it is the first and the last of its owner."""
    owner_ref, other_ref, _, kind_ref = schedule_refs
    batch, step, member = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first = rises(owner_ref, num_steps, step) & (member == 0)
    last = rises(owner_ref, num_steps, step + 1) & (member == pl.num_programs(3) - 1)
    return owner_ref[step], other_ref[step], kind_ref[batch * num_steps + step], first, last


def _on_kind(settings: Settings, kind: Any, body: Any) -> None:
    """body(kind) for a pair of blocks that see each other."""
    kinds = (WHOLE, MASKED, LOWER, UPPER) if settings.q_block == settings.k_block > settings.chunk else (WHOLE, MASKED)
    for each in kinds:
        pl.when(kind == each)(functools.partial(body, each))


def forward_kernel(
    settings: Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, vt_ref, first_ref, last_ref, out_ref, lse_ref, peak_ref, total_ref, acc_ref,
):  # fmt: skip
    """out [S, M] and log-sum-exp [1, S] of a query block, which owns its steps."""
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
    settings: Settings, kind: int, start: Any, q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref
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


def dq_kernel(
    settings: Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, kt_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, dq_ref, acc_ref,
):  # fmt: skip
    """dq [S, N] of a query block, which owns its steps."""
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


def backward_kernel(
    settings: Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref, oldest_ref, newest_ref,
    q_ref, k_ref, kt_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref,
    dq_acc_ref, dk_acc_ref, dv_acc_ref,
):  # fmt: skip
    """All gradients, key blocks own. dq_acc [members, slots, N, S] holds the query blocks that are under way
    (`intervals.under_way`)."""
    key_block, q_block, kind, is_first, is_last = _at((owner_ref, other_ref, fetch_ref, kind_ref), num_steps)
    refs, step = (q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref), pl.program_id(2)
    sum_ref: Any = None

    @pl.when(is_first)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    if dq_ref is not None:
        sum_ref = dq_acc_ref.at[pl.program_id(3), jax.lax.rem(q_block, dq_acc_ref.shape[1])]

        @pl.when(rises(newest_ref, num_steps, step))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

    def body(kind: int) -> None:
        for piece, weights_KS, dscores_KS in _gradients(settings, kind, key_block * settings.k_block, *refs):
            dscores_KS = dscores_KS.astype(q_ref.dtype)
            dv_acc_ref[piece.keys] += _product(weights_KS.astype(dout_ref.dtype), dout_ref[piece.queries], (1, 0))
            dk_acc_ref[piece.keys] += _product(dscores_KS, q_ref[piece.queries], (1, 0))
            if dq_ref is not None:
                sum_ref[:, piece.queries] += _product(kt_ref[:, piece.keys], dscores_KS, (1, 0))

    _on_kind(settings, kind, body)

    if dq_ref is not None:

        @pl.when(rises(oldest_ref, num_steps, step + 1))
        def _():
            dq_ref[...] = jnp.transpose(sum_ref[...] * settings.scale).astype(dq_ref.dtype)

    @pl.when(is_last)
    def _():
        dk_ref[...] = (dk_acc_ref[...] * settings.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def dkv_kernel(
    settings: Settings, num_steps: int, owner_ref, other_ref, fetch_ref, kind_ref,
    q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref,
):  # fmt: skip
    """`backward_kernel` without gradients of queries."""
    backward_kernel(
        settings, num_steps, owner_ref, other_ref, fetch_ref, kind_ref, None, None,
        q_ref, k_ref, None, v_ref, first_ref, last_ref, dout_ref, lse_ref, delta_ref, None, dk_ref, dv_ref,
        None, dk_acc_ref, dv_acc_ref,
    )  # fmt: skip
