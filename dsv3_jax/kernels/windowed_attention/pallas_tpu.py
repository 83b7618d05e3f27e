"""Attention by pattern on TPU: Pallas kernels in the manner of FlashAttention-2 (Dao 2023, arXiv:2307.08691).

The grid walks over the pairs of blocks that may see each other (`intervals.Schedule`). One backward kernel gives all
gradients: key blocks own its steps, and the gradients of the query blocks that they reach wait on the chip. Where those
would not fit there, two kernels take its place, and compute the scores twice.
"""

import functools
import math
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
    SKIPPED,
    Schedule,
    block_pairs,
    schedule_by_key,
    schedule_by_query,
    under_way,
    visible_interval,
)
from dsv3_jax.kernels.windowed_attention.tpu_kernels import (
    Settings,
    backward_kernel,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    rises,
)
from dsv3_jax.ops.patterns import reach

LANES = 128
LARGEST_BLOCK = 2**19  # bytes of keys or values: eight such blocks, twice each, their sums and scores fill `MEMORY`
SCALAR_MEMORY = int(0.9 * 2**20)  # bytes for plans, of the 1 MiB of a v5p and every later TPU
WAITING = 40 * 2**20  # bytes of gradients of queries that may wait on the chip: those of 54,000 queries 192 wide
MEMORY = 20 * 2**20  # bytes on the chip for all else; both together fit a v5p and every later TPU


class Blocks(NamedTuple):
    """Tokens of a query block, of a key block, and of the chunks of keys that are worked on at a time."""

    query: int
    key: int
    chunk: int


class _Specs:
    """Which block of an array is in memory at a step of the grid (B, heads, steps, members).

    Arrays are [B, heads, T, width], of queries or of keys. Blocks of the owners follow the steps, others are fetched.
    by_key: keys own, the grid's heads are theirs, and its members the query heads of each; else there is one member.
    """

    def __init__(self, settings: Settings, schedule: Schedule, group: int, by_key: bool):
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

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref, *_):
            head, block = self._place(of_query, b, h, s, j, owner_ref, fetch_ref, kind_ref)
            return b, head, block, 0

        return pl.BlockSpec((None, None, self._block(of_query), width), index)

    def columns(self, of_query: bool, width: int) -> pl.BlockSpec:
        """[width, block] of [B, heads, width, T]."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref, *_):
            head, block = self._place(of_query, b, h, s, j, owner_ref, fetch_ref, kind_ref)
            return b, head, 0, block

        return pl.BlockSpec((None, None, width, self._block(of_query)), index)

    def completed(self, width: int) -> pl.BlockSpec:
        """[block, width] of [B, heads, T, width], of the queries that are complete next, while keys own."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref, oldest_ref, newest_ref):
            now = rises(oldest_ref, self.num_steps, s + 1)  # for each member in turn; until then it is the first one's
            return b, h * self._group + jnp.where(now, j, 0), oldest_ref[s], 0

        return pl.BlockSpec((None, None, self._block(True), width), index)

    def interval(self) -> pl.BlockSpec:
        """[1, block] of [B, 1, T], of queries, for all heads."""

        def index(b, h, s, j, owner_ref, other_ref, fetch_ref, kind_ref, *_):
            return b, 0, self._place(True, b, h, s, j, owner_ref, fetch_ref, kind_ref)[1]

        return pl.BlockSpec((None, 1, self._block(True)), index)


def _plan(schedule: Schedule, *more: np.ndarray) -> tuple[Any, ...]:
    """What kernels prefetch."""
    return schedule.owner_S, schedule.other_S, schedule.fetch_BS.reshape(-1), schedule.kind_BS.reshape(-1), *more


def _scalar_bytes(plan: tuple[Any, ...]) -> int:
    return sum(x.size for x in plan) * 4


def _call(
    kernel: Any, specs: _Specs, plan: tuple[Any, ...], heads: int, inputs: Any, outputs: Any, scratch: Any, flops: int,
    waiting: int = 0,
):  # fmt: skip
    """Runs a kernel over the grid (B, heads, steps, members).

    inputs: (array, spec) of each. outputs: (shape, dtype, spec) of each. scratch: shapes, float32. flops: of one step.
    plan: of `_plan`. waiting: bytes of `scratch` that `MEMORY` does not hold.
    """
    settings, num_steps = specs.settings, specs.num_steps
    B, needed = len(inputs[0][0]), _scalar_bytes(plan)
    if needed > SCALAR_MEMORY:
        raise ConfigError(
            f"config.model.attention.implementation='pallas_tpu': the schedule of {B} rows a device with {num_steps} "
            f"steps needs {needed:,} bytes of scalar memory, of which it may take {SCALAR_MEMORY:,}; use fewer rows a "
            "device, a shorter sequence, a window, or implementation='blocked'"
        )
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(plan),
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=MEMORY + waiting,
        ),
        cost_estimate=pl.CostEstimate(steps * flops, steps * pair, steps * loaded + written),
        interpret=settings.interpret,
        name=kernel.__name__,
    )
    return run(*plan, *(x for x, _ in inputs))


def _run_forward(settings: Settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    """out_BHTM, and lse_BH1T in `settings.unit`: exactly the largest score where that is all there is."""
    (B, H, T, N), (G, M) = q_BHTN.shape, (v_BGTM.shape[1], v_BGTM.shape[3])
    S, K = settings.q_block, settings.k_block
    schedule = schedule_by_query(settings.pairs_S2, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, schedule, H // G, by_key=False)
    return _call(
        forward_kernel,
        specs,
        _plan(schedule),
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


def _run_backward(settings: Settings, saved: Any, cotangents: Any):
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

    by_key = schedule_by_key(pairs, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, by_key, group, by_key=True)
    kt_BGNT, scratch = jnp.swapaxes(k_BGTN, 2, 3), [(K, N), (K, M)]
    of_keys = [((B, G, T, N), k_BGTN.dtype, specs.rows(False, N)), ((B, G, T, M), v_BGTM.dtype, specs.rows(False, M))]
    oldest_S, newest_S = under_way(by_key)
    slots, plan = int(np.max(newest_S - oldest_S)) + 1, _plan(by_key, oldest_S, newest_S)
    needed = group * slots * N * S * 4
    if needed <= settings.waiting and _scalar_bytes(plan) <= SCALAR_MEMORY:
        dq_BHTN, dk_BGTN, dv_BGTM = _call(
            backward_kernel,
            specs,
            plan,
            G,
            inputs(specs, (kt_BGNT, specs.columns(False, N))),
            [((B, H, T, N), q_BHTN.dtype, specs.completed(N)), *of_keys],
            [(group, slots, N, S), *scratch],
            2 * S * K * (3 * N + 2 * M),
            waiting=needed,
        )
        return dq_BHTN, dk_BGTN, dv_BGTM, None, None
    dk_BGTN, dv_BGTM = _call(
        dkv_kernel, specs, _plan(by_key), G, inputs(specs), of_keys, scratch, 2 * S * K * (2 * N + 2 * M)
    )
    by_query = schedule_by_query(pairs, first_BT, last_BT, S, K, settings.chunk)
    specs = _Specs(settings, by_query, group, by_key=False)
    (dq_BHTN,) = _call(
        dq_kernel,
        specs,
        _plan(by_query),
        H,
        inputs(specs, (kt_BGNT, specs.columns(False, N))),
        [((B, H, T, N), q_BHTN.dtype, specs.rows(True, N))],
        [(N, S)],
        2 * S * K * (2 * N + M),
    )
    return dq_BHTN, dk_BGTN, dv_BGTM, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(settings, q_BHTN, k_BGTN, v_BGTM, first_BT, last_BT)[0]


def _attend_forward(settings: Settings, *inputs):
    out, lse = _run_forward(settings, *inputs)
    return (out, lse * settings.unit), (*inputs, out, lse)


_attend.defvjp(_attend_forward, _run_backward)


def block_sizes(pattern: LayerPattern, length: int, width_bytes: int = 256) -> Blocks:
    """Blocks as large as the reach, between 256 and 1024 tokens, where memory on the chip allows; chunks of 128.
    `width_bytes`: of a key or a value, the wider one.

    By the bundles that the compiler schedules, times trips, for v5p and v6e (docs/results/tpu_static.md). With a window
    of 512, blocks of 512 take two thirds of what blocks of 256 take; with 4096, blocks of 1024 eight to nine tenths of
    what blocks of 512 take. Chunks of 256 are no better.
    """
    bound = reach(pattern)
    size = 1024 if bound is None else min(1024, max(256, 1 << bound.bit_length()))
    while size > 256 and size * width_bytes > LARGEST_BLOCK:
        size //= 2
    count = -(-length // size)  # of equal blocks, so that little is padded
    size = -(-length // (count * LANES)) * LANES
    return Blocks(size, size, LANES)


def tpu_attention(
    call: Call, *, blocks: Blocks | None = None, waiting: int = WAITING, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`.

    Args:
      blocks: multiples of 128; by default `block_sizes`.
      waiting: how many bytes of gradients of queries may wait on the chip; where they need more, the backward pass
        takes two kernels.
      interpret: runs the kernels without a TPU, slowly; by default wherever there is none. True, or Pallas's
        `InterpretParams`, which model copies to and from the chip too.
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
        settings = Settings(call.scale, call.softcap, q_block, k_block, chunk, pairs_S2, waiting, interpreted)
        first_BT, last_BT = visible_interval(pattern, call.causal, place)

        def heads_first(x_BTHN: jax.Array) -> jax.Array:
            return jnp.pad(jnp.swapaxes(x_BTHN, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

        first_BT = jnp.pad(first_BT, ((0, 0), (0, padding)), constant_values=T)
        last_BT = jnp.pad(last_BT, ((0, 0), (0, padding)), constant_values=-1)
        given = heads_first(q_BTHN), heads_first(k_BTGN), heads_first(v_BTGM), first_BT, last_BT
        out_BHTM, lse_BH1T = cast(tuple[jax.Array, jax.Array], _attend(settings, *given))
        return jnp.swapaxes(out_BHTM, 1, 2)[:, :T], lse_BH1T[:, :, 0, :T]

    return attend_with_globals(local, call)
