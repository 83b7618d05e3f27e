"""Attention by pattern on Hopper GPUs: Mosaic GPU kernels in the manner of FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608).

A block of threads owns 128 queries (keys, for the gradients of keys and values), 64 for each of two warpgroups; a third
warpgroup copies blocks of the other side into a ring in shared memory. Which blocks those are follows from the queries'
intervals at run time: none that no query sees. While one warpgroup exponentiates, the other multiplies. There are two
backward kernels rather than one that adds up gradients of queries in memory: results do not depend on timing.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.hopper import SWIZZLE_BYTES, WARPGROUP_ROWS, Ring, Warpgroup, interpreter, width_of
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.global_set import attend_with_globals
from dsv3_jax.kernels.windowed_attention.intervals import inner_bounds, key_blocks, query_blocks, visible_interval

LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the score of a key that is not seen: its exponential is 0 beside LOWEST too
READERS = 2  # warpgroups that compute
OWNED = READERS * WARPGROUP_ROWS
WIDEST = 320  # key width + value width whose gradients fit the registers of a warpgroup


class Blocks(NamedTuple):
    """Keys in a step of the forward kernel and of the kernel for dq, queries in a step of the one for dk and dv; slots
    of the ring."""

    forward: int
    dq: int
    dkv: int
    slots: int


@dataclasses.dataclass(frozen=True)
class _Settings:
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


def _capped(settings: _Settings, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
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

    def hide(self, settings: _Settings, scores: jax.Array, key: Any, keys_axis: int, hidden: float) -> jax.Array:
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


def _forward_kernel(settings: _Settings, refs: Any, shared: Any, barriers: Any) -> None:
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
            exponent_S = new_peak_S * settings.exponent
            exp_SK = jnp.exp2(scores_SK * settings.exponent - _across(exponent_S, shape))
            shrink_S = jnp.exp2(peak_S * settings.exponent - exponent_S)
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
        lse_smem[group] = jnp.where(some_S, peak_S * settings.unit + jnp.log(safe_S), -jnp.inf)
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


def _dq_kernel(settings: _Settings, refs: Any, shared: Any, barriers: Any) -> None:
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
            weights_SK = jnp.exp2(scores_SK * settings.exponent - _across(lse_S, shape))
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


def _dkv_kernel(settings: _Settings, refs: Any, shared: Any, barriers: Any) -> None:
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
            weights_KS = jnp.exp2(scores_KS * settings.exponent - _across(lse_S, shape, 1))
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


def _call(kernel: Any, settings: _Settings, heads: int, inputs: Any, outputs: Any, shared: Any, barriers: Any) -> Any:
    """Runs a kernel, a block of threads for each batch row, head and block of OWNED rows. inputs: the first is
    [B, T, …]. outputs: (shape, dtype) of each."""
    B, T = inputs[0].shape[:2]

    def body(*refs):
        kernel(settings, refs[: -len(shared) - len(barriers)], *_cut(refs, len(shared), len(barriers)))

    body.__name__ = kernel.__name__.strip("_")  # the kernel's, for profilers
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types=[*shared, *barriers],
        grid=(B, heads, T // OWNED),  # the last one runs first
        grid_names=("batch", "heads", "blocks"),
        num_threads=READERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if settings.interpret else None,
    )
    return run(*inputs)


def _cut(refs: Any, shared: int, barriers: int) -> tuple[Any, Any]:
    """The last refs: shared memory, and barriers."""
    return refs[-shared - barriers : -barriers], refs[-barriers:]


def _start_barrier(copies: int) -> Any:
    return plgpu.Barrier(num_arrivals=copies, num_barriers=READERS)


def _run_forward(settings: _Settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    """out_BTHM, and lse_BHT."""
    (B, T, H, N), M = q_BTHN.shape, v_BTGM.shape[-1]
    own, (block, _, _, slots), dtype = settings.warpgroup, settings.blocks, q_BTHN.dtype
    S = WARPGROUP_ROWS
    shared = [
        own.matrix(READERS, S, N, dtype=dtype),
        own.matrix(slots, block, N, dtype=dtype),
        own.matrix(slots, block, M, dtype=dtype),
        own.matrix(READERS, S, M, dtype=dtype),
        plgpu.SMEM((READERS, S), jnp.float32),
        *[plgpu.SMEM((READERS, S), jnp.int32)] * 2,
    ]
    ring = Ring.barriers(slots, 1, READERS)
    inner = inner_bounds(first_BT, last_BT, S), key_blocks(first_BT, last_BT, OWNED, block)
    return _call(
        _forward_kernel,
        settings,
        H,
        (q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT, *inner),
        [((B, T, H, M), dtype), ((B, H, T), jnp.float32)],
        shared,
        [_start_barrier(3), *ring, *ring, plgpu.Barrier(num_arrivals=READERS)],
    )


def _run_backward(settings: _Settings, saved: Any, cotangents: Any):
    q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT, out_BTHM, lse_BHT = saved
    dout_BTHM, dlse_BHT = cotangents
    (B, T, H, N), (G, M), dtype = q_BTHN.shape, v_BTGM.shape[2:], q_BTHN.dtype
    # d scores = weights · (dout · v − Σ dout · out + dlse)
    delta_BTH = jnp.sum(dout_BTHM.astype(jnp.float32) * out_BTHM.astype(jnp.float32), axis=-1)
    delta_BHT = jnp.swapaxes(delta_BTH, 1, 2) - dlse_BHT
    lse_BHT = jnp.where(jnp.isfinite(lse_BHT), lse_BHT * math.log2(math.e), jnp.inf)  # weights of 0 where none is seen
    own, S, (_, dq, dkv, slots) = settings.warpgroup, WARPGROUP_ROWS, settings.blocks
    given = q_BTHN, k_BTGN, v_BTGM, dout_BTHM, lse_BHT, delta_BHT, first_BT, last_BT

    def vectors(count: int, block: int) -> list[Any]:
        return [plgpu.SMEM((count, block), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)]

    (dq_BTHN,) = _call(
        _dq_kernel,
        settings,
        H,
        (*given, inner_bounds(first_BT, last_BT, S), key_blocks(first_BT, last_BT, OWNED, dq)),
        [((B, T, H, N), dtype)],
        [
            own.matrix(READERS, S, N, dtype=dtype),
            own.matrix(READERS, S, M, dtype=dtype),
            own.matrix(slots, dq, N, dtype=dtype),
            own.matrix(slots, dq, M, dtype=dtype),
            *vectors(READERS, S),
        ],
        [_start_barrier(6), *Ring.barriers(slots, 2, READERS)],
    )
    narrow = functools.partial(own.matrix, dtype=dtype, swizzle=min(SWIZZLE_BYTES, dkv * dtype.itemsize))
    dk_BTGN, dv_BTGM = _call(
        _dkv_kernel,
        settings,
        G,
        (*given, inner_bounds(first_BT, last_BT, dkv), query_blocks(first_BT, last_BT, dkv, OWNED)),
        [((B, T, G, N), dtype), ((B, T, G, M), dtype)],
        [
            narrow(READERS, S, N),
            narrow(READERS, S, M),
            narrow(slots, dkv, N),
            narrow(slots, dkv, M),
            *vectors(slots, dkv),
        ],
        [_start_barrier(2), *Ring.barriers(slots, 6, READERS)],
    )
    return dq_BTHN, dk_BTGN, dv_BTGM, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    return _run_forward(settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT)


def _attend_forward(settings: _Settings, *inputs):
    out, lse = _run_forward(settings, *inputs)
    return (out, lse), (*inputs, out, lse)


_attend.defvjp(_attend_forward, _run_backward)


def block_sizes(key_width: int, value_width: int, softcap: float | None = None) -> Blocks:
    """The largest blocks whose kernels fit shared memory and spill no registers, by the assembler's report."""
    wide = key_width + value_width > 256  # as latent attention's 192 + 128
    return Blocks(64 if wide else 128, 64, 32 if wide or softcap is not None else 64, 2)


def gpu_attention(
    call: Call, *, blocks: Blocks | None = None, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`.

    Args:
      blocks: by default `block_sizes`.
      interpret: runs the kernels without a GPU, slowly (see `api.refusal`); by default wherever there is none.
    """

    def local(call: Call):
        (T, _, N), M, width = call.q_BTHN.shape[1:], call.v_BTGM.shape[-1], width_of(call.q_BTHN.dtype)

        def pad(x_BTHN: jax.Array) -> jax.Array:
            return jnp.pad(x_BTHN, ((0, 0), (0, -T % OWNED), (0, 0), (0, -x_BTHN.shape[-1] % width)))

        q_BTHN, k_BTGN, v_BTGM = pad(call.q_BTHN), pad(call.k_BTGN), pad(call.v_BTGM)
        first_BT, last_BT = visible_interval(call.pattern, call.causal, call.place)
        first_BT = jnp.pad(first_BT, ((0, 0), (0, -T % OWNED)), constant_values=T)
        last_BT = jnp.pad(last_BT, ((0, 0), (0, -T % OWNED)), constant_values=-1)
        sizes = blocks or block_sizes(N, M, call.softcap)
        interpreted = jax.default_backend() != "gpu" if interpret is None else interpret
        settings = _Settings(call.scale, call.softcap, sizes, interpreted)
        given = q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT
        out_BTHM, lse_BHT = cast(tuple[jax.Array, jax.Array], _attend(settings, *given))
        return out_BTHM[:, :T, :, :M], lse_BHT[:, :, :T]

    return attend_with_globals(local, call)
