"""The Mosaic GPU kernels of `pallas_gpu.py`: what a block of threads does."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, Ring, Warpgroup

READERS = 2  # warpgroups that compute
OWNED = READERS * WARPGROUP_ROWS


class Block(NamedTuple):
    """What a step of a kernel takes: rows of keys or of queries, of which the ring holds `slots` blocks."""

    rows: int
    slots: int


class Blocks(NamedTuple):
    """Of keys in the forward kernel and in the one for dq, of queries in the one for dk and dv."""

    forward: Block
    dq: Block
    dkv: Block


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static of a call."""

    scale: float
    softcap: float | None
    blocks: Blocks
    pairs: tuple[int, int, int]  # of a query and a key in the blocks of a row that see each other, of each kernel
    interpret: bool

    @property
    def exponent(self) -> float:
        """By which scores are multiplied before 2 is raised to them: log2(e), and the scale if no soft-cap has it."""
        return math.log2(math.e) * (self.scale if self.softcap is None else 1.0)

    @property
    def warpgroup(self) -> Warpgroup:
        """Its operations."""
        return Warpgroup(self.interpret)


def _capped(settings: Settings, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores, without a soft-cap still to be scaled, and with one d score / d (scaled product)."""
    if settings.softcap is None:
        return product, None
    # tanh(x) = 1 − 2 / (1 + e^2x): the chip's own approximation of tanh has 11 bits
    power = jnp.exp2(product * (2 * math.log2(math.e) * settings.scale / settings.softcap))
    bounded = 1.0 - 2.0 / (1.0 + power)
    return settings.softcap * bounded, 1.0 - bounded * bounded


class _Sight(NamedTuple):
    """Which keys some queries see: each one's first and last, in shared memory."""

    first_smem: Any
    last_smem: Any

    def mask(self, own: Warpgroup, scores: jax.Array, key: Any, keys_axis: int, hidden: float) -> jax.Array:
        """`scores` of keys from row `key` on, along `keys_axis`, with `hidden` where a key is not seen."""
        key_ids = own.iota(scores.shape, keys_axis) + key
        first, last = (
            jax.lax.broadcast_in_dim(own.load(x, of_rows=keys_axis == 1), scores.shape, [1 - keys_axis]) for x in self
        )
        return jnp.where((key_ids >= first) & (key_ids <= last), scores, hidden)


def _across(x: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    """A vector along `axis`, the same along the other."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _over_blocks(bounds: tuple[Any, Any], whole: tuple[Any, Any] | None, step_of: Any, carry: Any) -> Any:
    """carry = step_of(is_masked, block, carry) for the blocks of `bounds`, from the first to before the last; masked
    are those outside of `whole`, of which all see all, and without a `whole` all: one loop takes fewer registers."""
    start, stop = bounds
    if whole is None:
        return jax.lax.fori_loop(start, stop, functools.partial(step_of, True), carry)
    first = jnp.clip(whole[0], start, stop)
    last = jnp.clip(whole[1], first, stop)
    for is_masked, begin, end in ((True, start, first), (False, first, last), (True, last, stop)):
        carry = jax.lax.fori_loop(begin, end, functools.partial(step_of, is_masked), carry)
    return carry


def forward_kernel(settings: Settings, refs: Any, shared: Any, barriers: Any) -> None:
    """Output, and binary logarithm of the sum of 2 to the exponents, of OWNED queries."""
    q_ref, k_ref, v_ref, first_ref, last_ref, whole_ref, blocks_ref, out_ref, lse_ref = refs
    q_smem, k_smem, v_smem, out_smem, lse_smem, first_smem, last_smem = shared
    start_barrier, keys_full, keys_free, values_full, values_free, turn_barrier = barriers
    own, (block, slots) = settings.warpgroup, settings.blocks.forward
    keys, values = Ring(slots, keys_full, keys_free), Ring(slots, values_full, values_free)
    batch, head, group = jax.lax.axis_index("batch"), jax.lax.axis_index("heads"), jax.lax.axis_index("warpgroup")
    index = blocks_ref.shape[1] - 1 - jax.lax.axis_index("blocks")  # late queries see most: they begin
    start, stop = blocks_ref[batch, index, 0], blocks_ref[batch, index, 1]

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        rows, mine = pl.ds(index * OWNED + group * WARPGROUP_ROWS, WARPGROUP_ROWS), start_barrier.at[group]
        M = v_smem.shape[-1]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], mine)
        sight = _Sight(first_smem.at[group], last_smem.at[group])
        plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], sight.first_smem, mine)
        plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], sight.last_smem, mine)
        plgpu.barrier_wait(mine)
        part = index * READERS + group

        def change_turns():
            plgpu.barrier_arrive(turn_barrier)
            plgpu.barrier_wait(turn_barrier)

        pl.when(group == 1)(change_turns)

        def step_of(is_masked, at, carry):
            acc_SM, peak_S, total_S = carry
            step, shape = at - start, (WARPGROUP_ROWS, block)
            slot = keys.wait(step)
            of_keys = own.zeros(*shape), lambda: [(q_smem.at[group], own.transposed(k_smem.at[slot]))]
            (product_SK,) = own.products(of_keys, meanwhile=change_turns)
            keys.release(step)
            scores_SK, _ = _capped(settings, product_SK)
            if is_masked:
                scores_SK = sight.mask(own, scores_SK, at * block, 1, -jnp.inf)
            new_peak_S = jnp.maximum(peak_S, jnp.max(scores_SK, axis=1) * settings.exponent)
            shift_S = jnp.where(new_peak_S == -jnp.inf, 0.0, new_peak_S)  # none seen yet: −inf − −inf is NaN
            exp_SK = jnp.exp2(scores_SK * settings.exponent - _across(shift_S, shape))
            shrink_S = jnp.exp2(peak_S - shift_S)
            acc_SM = acc_SM * _across(shrink_S, acc_SM.shape)
            weights_SK = exp_SK.astype(v_smem.dtype)
            values.wait(step)
            change_turns()
            acc_SM, total_S = own.products(
                (acc_SM, lambda: [(weights_SK, v_smem.at[slot])]),
                meanwhile=lambda total_S: total_S * shrink_S + jnp.sum(exp_SK, axis=1),
                value=total_S,
            )
            values.release(step)
            return acc_SM, new_peak_S, total_S

        carry = own.zeros(WARPGROUP_ROWS, M), own.full(WARPGROUP_ROWS, -jnp.inf), own.full(WARPGROUP_ROWS, 0.0)
        whole = whole_ref[batch, part, 0], whole_ref[batch, part, 1]
        acc_SM, peak_S, total_S = _over_blocks((start, stop), whole, step_of, carry)
        pl.when(group == 0)(change_turns)
        some_S = total_S > 0
        safe_S = jnp.where(some_S, total_S, 1.0)
        own.store(
            (acc_SM / _across(safe_S, acc_SM.shape), out_smem.at[group], out_ref.at[batch, rows, head]),
            (
                jnp.where(some_S, peak_S + jnp.log(safe_S) * math.log2(math.e), -jnp.inf),
                lse_smem.at[group],
                lse_ref.at[batch, head, rows],
            ),
        )

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        key_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        @pl.loop(0, stop - start)
        def _(step):
            rows = pl.ds((start + step) * block, block)
            for ring, ref, smem in ((keys, k_ref, k_smem), (values, v_ref, v_smem)):
                slot, barrier = ring.claim(step)
                plgpu.copy_gmem_to_smem(ref.at[batch, rows, key_head], smem.at[slot], barrier)

        keys.drain(stop - start)
        values.drain(stop - start)


def dq_kernel(settings: Settings, refs: Any, shared: Any, barriers: Any) -> None:
    """The gradient of OWNED queries."""
    q_ref, k_ref, v_ref, dout_ref, lse_ref, offset_ref, first_ref, last_ref, whole_ref, blocks_ref, dq_ref = refs
    q_smem, dout_smem, k_smem, v_smem, lse_smem, offset_smem, first_smem, last_smem = shared
    start_barrier, full, free = barriers
    own, (block, slots) = settings.warpgroup, settings.blocks.dq
    ring = Ring(slots, full, free)
    batch, head, group = jax.lax.axis_index("batch"), jax.lax.axis_index("heads"), jax.lax.axis_index("warpgroup")
    index = blocks_ref.shape[1] - 1 - jax.lax.axis_index("blocks")
    start, stop = blocks_ref[batch, index, 0], blocks_ref[batch, index, 1]

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        rows, mine = pl.ds(index * OWNED + group * WARPGROUP_ROWS, WARPGROUP_ROWS), start_barrier.at[group]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, head], dout_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(offset_ref.at[batch, head, rows], offset_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], first_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], last_smem.at[group], mine)
        plgpu.barrier_wait(mine)
        lse_S, offset_S = (own.load(x.at[group], of_rows=True) for x in (lse_smem, offset_smem))
        part, sight = index * READERS + group, _Sight(first_smem.at[group], last_smem.at[group])

        def step_of(is_masked, at, acc_SN):
            step, shape = at - start, (WARPGROUP_ROWS, block)
            slot = ring.wait(step)
            product_SK, dweights_SK = own.products(
                (own.zeros(*shape), lambda: [(q_smem.at[group], own.transposed(k_smem.at[slot]))]),
                (_across(offset_S, shape), lambda: [(dout_smem.at[group], own.transposed(v_smem.at[slot]))]),
            )
            scores_SK, slope_SK = _capped(settings, product_SK)
            weights_SK = jnp.exp2(scores_SK * settings.exponent - _across(lse_S, shape))
            dscores_SK = weights_SK * dweights_SK
            dscores_SK = dscores_SK if slope_SK is None else dscores_SK * slope_SK
            if is_masked:
                dscores_SK = sight.mask(own, dscores_SK, at * block, 1, 0.0)
            dscores_SK = dscores_SK.astype(k_smem.dtype)
            (acc_SN,) = own.products((acc_SN, lambda: [(dscores_SK, k_smem.at[slot])]))
            ring.release(step)
            return acc_SN

        whole = whole_ref[batch, part, 0], whole_ref[batch, part, 1]
        acc_SN = _over_blocks((start, stop), whole, step_of, own.zeros(*q_smem.shape[1:]))
        own.store((acc_SN * settings.scale, q_smem.at[group], dq_ref.at[batch, rows, head]))

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        key_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        @pl.loop(0, stop - start)
        def _(step):
            rows = pl.ds((start + step) * block, block)
            slot, barrier = ring.claim(step)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, key_head], k_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, key_head], v_smem.at[slot], barrier)

        ring.drain(stop - start)


def dkv_kernel(settings: Settings, refs: Any, shared: Any, barriers: Any) -> None:
    """The gradients of OWNED keys and values, of all query heads of their head."""
    q_ref, k_ref, v_ref, dout_ref, lse_ref, offset_ref, first_ref, last_ref, whole_ref, blocks_ref, dk_ref, dv_ref = (
        refs
    )
    k_smem, v_smem, q_smem, dout_smem, lse_smem, offset_smem, first_smem, last_smem = shared
    start_barrier, full, free = barriers
    own, (block, slots) = settings.warpgroup, settings.blocks.dkv
    ring = Ring(slots, full, free)
    batch, head, group = jax.lax.axis_index("batch"), jax.lax.axis_index("heads"), jax.lax.axis_index("warpgroup")
    index = jax.lax.axis_index("blocks")  # early keys are seen most: they begin
    start, stop = blocks_ref[batch, index, 0], blocks_ref[batch, index, 1]
    heads = q_ref.shape[2] // k_ref.shape[2]
    count, steps = stop - start, (stop - start) * heads

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        row, mine = index * OWNED + group * WARPGROUP_ROWS, start_barrier.at[group]
        rows, part = pl.ds(row, WARPGROUP_ROWS), index * READERS + group
        plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, head], k_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, head], v_smem.at[group], mine)
        plgpu.barrier_wait(mine)
        whole = (whole_ref[batch, part, 0], whole_ref[batch, part, 1]) if block == WARPGROUP_ROWS else None

        def of_head(q_head, carry):
            def step_of(is_masked, at, carry):
                dk_KN, dv_KM = carry
                step, shape = q_head * count + at - start, (WARPGROUP_ROWS, block)
                slot = ring.wait(step)
                of_queries = own.zeros(*shape), lambda: [(k_smem.at[group], own.transposed(q_smem.at[slot]))]
                (product_KS,) = own.products(of_queries)
                scores_KS, slope_KS = _capped(settings, product_KS)
                lse_S = own.load(lse_smem.at[slot], of_rows=False)
                weights_KS = jnp.exp2(scores_KS * settings.exponent - _across(lse_S, shape, 1))
                if is_masked:
                    sight = _Sight(first_smem.at[slot], last_smem.at[slot])
                    weights_KS = sight.mask(own, weights_KS, row, 0, 0.0)
                rounded_KS = weights_KS.astype(dout_smem.dtype)
                offset_KS = _across(own.load(offset_smem.at[slot], of_rows=False), shape, 1)
                dv_KM, dweights_KS = own.products(
                    (dv_KM, lambda: [(rounded_KS, dout_smem.at[slot])]),
                    (offset_KS, lambda: [(v_smem.at[group], own.transposed(dout_smem.at[slot]))]),
                )
                dscores_KS = weights_KS * dweights_KS
                dscores_KS = (dscores_KS if slope_KS is None else dscores_KS * slope_KS).astype(q_smem.dtype)
                (dk_KN,) = own.products((dk_KN, lambda: [(dscores_KS, q_smem.at[slot])]))
                ring.release(step)
                return dk_KN, dv_KM

            return _over_blocks((start, stop), whole, step_of, carry)

        carry = own.zeros(*k_smem.shape[1:]), own.zeros(*v_smem.shape[1:])
        dk_KN, dv_KM = jax.lax.fori_loop(0, heads, of_head, carry)
        own.store(
            (dk_KN * settings.scale, k_smem.at[group], dk_ref.at[batch, rows, head]),
            (dv_KM, v_smem.at[group], dv_ref.at[batch, rows, head]),
        )

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            q_head = head * heads + jax.lax.div(step, count)
            rows = pl.ds((start + jax.lax.rem(step, count)) * block, block)
            slot, barrier = ring.claim(step)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, q_head], q_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, q_head], dout_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, q_head, rows], lse_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(offset_ref.at[batch, q_head, rows], offset_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], first_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], last_smem.at[slot], barrier)

        ring.drain(steps)
