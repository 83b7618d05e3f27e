"""The Mosaic GPU kernels of `pallas_gpu.py`: what a block of threads does."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, Ring, Warpgroup

LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the score of a key that is not seen: its exponential is 0 beside LOWEST too
READERS = 2  # warpgroups that compute
OWNED = READERS * WARPGROUP_ROWS


class Blocks(NamedTuple):
    """Keys in a step of the forward kernel and of the kernel for dq, queries in a step of the one for dk and dv; slots
    of the ring."""

    forward: int
    dq: int
    dkv: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static of a call. log2(e) · scale turns products into exponents of 2; with a soft-cap log2(e) alone."""

    scale: float
    softcap: float | None
    blocks: Blocks
    interpret: bool

    @property
    def exponent(self) -> float:
        """By which scores are multiplied before 2 is raised to them."""
        return math.log2(math.e) * self.unit

    @property
    def unit(self) -> float:
        """Natural logarithm of e^score for a score of 1."""
        return self.scale if self.softcap is None else 1.0

    @property
    def warpgroup(self) -> Warpgroup:
        """Its operations."""
        return Warpgroup(self.interpret)


def _capped(settings: Settings, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores in `settings.unit`, and d score / d (scaled product) with a soft-cap."""
    if settings.softcap is None:
        return product, None
    # tanh(x) = 1 − 2 / (1 + e^2x): the chip's own approximation of tanh has 11 bits
    power = jnp.exp2(product * (2 * math.log2(math.e) * settings.scale / settings.softcap))
    bounded = 1.0 - 2.0 / (1.0 + power)
    return settings.softcap * bounded, 1.0 - bounded * bounded


class _Sight(NamedTuple):
    """Which keys a warpgroup's queries see: each query's first and last, in shared memory, and what all of them see."""

    first_smem: Any
    last_smem: Any
    latest_first: Any
    earliest_last: Any

    def hide(self, settings: Settings, scores: jax.Array, key: Any, keys_axis: int, hidden: float) -> jax.Array:
        """`scores` of keys from row `key` on, along `keys_axis`, with `hidden` where a key is not seen."""
        own = settings.warpgroup

        def masked(scores):
            key_ids = own.iota(scores.shape, keys_axis) + key
            first, last = (
                jax.lax.broadcast_in_dim(own.load(x, of_rows=keys_axis == 1), scores.shape, [1 - keys_axis])
                for x in (self.first_smem, self.last_smem)
            )
            return jnp.where((key_ids >= first) & (key_ids <= last), scores, hidden)

        count = scores.shape[keys_axis]
        whole = (self.latest_first <= key) & (self.earliest_last >= key + (count - 1))
        return jax.lax.cond(whole, lambda scores: scores, masked, scores)


def _across(x: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    """A vector along `axis`, the same along the other."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def forward_kernel(settings: Settings, refs: Any, shared: Any, barriers: Any) -> None:
    """Output and log-sum-exp of OWNED queries."""
    q_ref, k_ref, v_ref, first_ref, last_ref, inner_ref, blocks_ref, out_ref, lse_ref = refs
    q_smem, k_smem, v_smem, out_smem, lse_smem, first_smem, last_smem = shared
    start_barrier, keys_full, keys_free, values_full, values_free, turn_barrier = barriers
    own, block = settings.warpgroup, settings.blocks.forward
    keys, values = (Ring(settings.blocks.slots, *x) for x in ((keys_full, keys_free), (values_full, values_free)))
    batch, head, group = jax.lax.axis_index("batch"), jax.lax.axis_index("heads"), jax.lax.axis_index("warpgroup")
    index = blocks_ref.shape[1] - 1 - jax.lax.axis_index("blocks")  # late queries see most: they begin
    start, stop = blocks_ref[batch, index, 0], blocks_ref[batch, index, 1]
    steps = stop - start

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        row = index * OWNED + group * WARPGROUP_ROWS
        rows, (_, M) = pl.ds(row, WARPGROUP_ROWS), out_smem.shape[1:]
        mine = start_barrier.at[group]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], first_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], last_smem.at[group], mine)
        plgpu.barrier_wait(mine)
        part = index * READERS + group
        bounds = inner_ref[batch, part, 0], inner_ref[batch, part, 1]
        sight = _Sight(first_smem.at[group], last_smem.at[group], *bounds)

        def change_turns():
            plgpu.barrier_arrive(turn_barrier)
            plgpu.barrier_wait(turn_barrier)

        pl.when(group == 1)(change_turns)

        def step_of(step, carry):
            acc_SM, peak_S, total_S = carry
            slot, shape = keys.wait(step), (WARPGROUP_ROWS, block)
            term = own.zeros(*shape), q_smem.at[group], own.transposed(k_smem.at[slot])
            (product_SK,) = own.products(term, meanwhile=change_turns)
            keys.release(step)
            scores_SK, _ = _capped(settings, product_SK)
            scores_SK = sight.hide(settings, scores_SK, (start + step) * block, 1, HIDDEN)
            new_peak_S = jnp.maximum(peak_S, jnp.max(scores_SK, axis=1))
            # Differences first: a fused multiply-add leaves what rounding took of LOWEST, and 2 to that is infinite.
            exp_SK = jnp.exp2((scores_SK - _across(new_peak_S, shape)) * settings.exponent)
            shrink_S = jnp.exp2((peak_S - new_peak_S) * settings.exponent)
            total_S = total_S * shrink_S + jnp.sum(exp_SK, axis=1)
            acc_SM = acc_SM * _across(shrink_S, acc_SM.shape)
            weights_SK = exp_SK.astype(v_smem.dtype)
            values.wait(step)
            change_turns()
            (acc_SM,) = own.products((acc_SM, weights_SK, v_smem.at[slot]))
            values.release(step)
            return acc_SM, new_peak_S, total_S

        carry = own.zeros(WARPGROUP_ROWS, M), own.full(WARPGROUP_ROWS, LOWEST), own.full(WARPGROUP_ROWS, 0.0)
        acc_SM, peak_S, total_S = jax.lax.fori_loop(0, steps, step_of, carry)
        pl.when(group == 0)(change_turns)
        some_S = total_S > 0
        safe_S = jnp.where(some_S, total_S, 1.0)
        out_smem[group] = (acc_SM / _across(safe_S, acc_SM.shape)).astype(out_smem.dtype)
        lse_smem[group] = jnp.where(some_S, peak_S + jnp.log(safe_S) / settings.unit, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        key_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        @pl.loop(0, steps)
        def _(step):
            rows = pl.ds((start + step) * block, block)
            for ring, ref, smem in ((keys, k_ref, k_smem), (values, v_ref, v_smem)):
                slot, barrier = ring.claim(step)
                plgpu.copy_gmem_to_smem(ref.at[batch, rows, key_head], smem.at[slot], barrier)

        keys.drain(steps)
        values.drain(steps)


def dq_kernel(settings: Settings, refs: Any, shared: Any, barriers: Any) -> None:
    """The gradient of OWNED queries."""
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, first_ref, last_ref, inner_ref, blocks_ref, dq_ref = refs
    q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, first_smem, last_smem = shared
    start_barrier, full, free = barriers
    own, block, ring = settings.warpgroup, settings.blocks.dq, Ring(settings.blocks.slots, full, free)
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
        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], first_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], last_smem.at[group], mine)
        plgpu.barrier_wait(mine)
        lse_S, delta_S = (own.load(x.at[group], of_rows=True) for x in (lse_smem, delta_smem))
        part = index * READERS + group
        bounds = inner_ref[batch, part, 0], inner_ref[batch, part, 1]
        sight = _Sight(first_smem.at[group], last_smem.at[group], *bounds)

        def step_of(step, acc_SN):
            slot, shape = ring.wait(step), (WARPGROUP_ROWS, block)
            product_SK, dweights_SK = own.products(
                (own.zeros(*shape), q_smem.at[group], own.transposed(k_smem.at[slot])),
                (own.zeros(*shape), dout_smem.at[group], own.transposed(v_smem.at[slot])),
            )
            scores_SK, slope_SK = _capped(settings, product_SK)
            weights_SK = jnp.exp2((scores_SK - _across(lse_S, shape)) * settings.exponent)
            dscores_SK = weights_SK * (dweights_SK - _across(delta_S, shape))
            dscores_SK = dscores_SK if slope_SK is None else dscores_SK * slope_SK
            dscores_SK = sight.hide(settings, dscores_SK, (start + step) * block, 1, 0.0)
            (acc_SN,) = own.products((acc_SN, dscores_SK.astype(k_smem.dtype), k_smem.at[slot]))
            ring.release(step)
            return acc_SN

        acc_SN = jax.lax.fori_loop(0, stop - start, step_of, own.zeros(*q_smem.shape[1:]))
        q_smem[group] = (acc_SN * settings.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[group], dq_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

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
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, first_ref, last_ref, inner_ref, blocks_ref, dk_ref, dv_ref = refs
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, first_smem, last_smem = shared
    start_barrier, full, free = barriers
    own, block, ring = settings.warpgroup, settings.blocks.dkv, Ring(settings.blocks.slots, full, free)
    batch, head, group = jax.lax.axis_index("batch"), jax.lax.axis_index("heads"), jax.lax.axis_index("warpgroup")
    index = jax.lax.axis_index("blocks")  # early keys are seen most: they begin
    start, stop = blocks_ref[batch, index, 0], blocks_ref[batch, index, 1]
    heads = q_ref.shape[2] // k_ref.shape[2]
    count, steps = stop - start, (stop - start) * heads

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        row, mine = index * OWNED + group * WARPGROUP_ROWS, start_barrier.at[group]
        rows = pl.ds(row, WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, head], k_smem.at[group], mine)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, head], v_smem.at[group], mine)
        plgpu.barrier_wait(mine)

        def step_of(step, carry):
            dk_KN, dv_KM = carry
            slot, shape = ring.wait(step), (WARPGROUP_ROWS, block)
            part = start + jax.lax.rem(step, count)
            bounds = inner_ref[batch, part, 0], inner_ref[batch, part, 1]
            sight = _Sight(first_smem.at[slot], last_smem.at[slot], *bounds)
            (product_KS,) = own.products((own.zeros(*shape), k_smem.at[group], own.transposed(q_smem.at[slot])))
            scores_KS, slope_KS = _capped(settings, product_KS)
            lse_S = own.load(lse_smem.at[slot], of_rows=False)
            weights_KS = jnp.exp2((scores_KS - _across(lse_S, shape, 1)) * settings.exponent)
            weights_KS = sight.hide(settings, weights_KS, row, 0, 0.0)
            dv_KM, dweights_KS = own.products(
                (dv_KM, weights_KS.astype(dout_smem.dtype), dout_smem.at[slot]),
                (own.zeros(*shape), v_smem.at[group], own.transposed(dout_smem.at[slot])),
            )
            delta_S = own.load(delta_smem.at[slot], of_rows=False)
            dscores_KS = weights_KS * (dweights_KS - _across(delta_S, shape, 1))
            dscores_KS = dscores_KS if slope_KS is None else dscores_KS * slope_KS
            (dk_KN,) = own.products((dk_KN, dscores_KS.astype(q_smem.dtype), q_smem.at[slot]))
            ring.release(step)
            return dk_KN, dv_KM

        carry = own.zeros(*k_smem.shape[1:]), own.zeros(*v_smem.shape[1:])
        dk_KN, dv_KM = jax.lax.fori_loop(0, steps, step_of, carry)
        k_smem[group] = (dk_KN * settings.scale).astype(k_smem.dtype)
        v_smem[group] = dv_KM.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[group], dk_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(v_smem.at[group], dv_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

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
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, q_head, rows], delta_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(first_ref.at[batch, rows], first_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(last_ref.at[batch, rows], last_smem.at[slot], barrier)

        ring.drain(steps)
