"""Attention to a cache on Hopper GPUs: a Mosaic GPU kernel, split over the slots (Flash-Decoding, Dao et al. 2023).

A block of threads attends 64 rows (the query heads of one key head, of all new tokens) to a share of those blocks of
slots that are seen; the shares are merged by log-sum-exp. Matrices are cut into pieces 64 columns wide. Where values
are wider than the registers of a warpgroup hold, as latent attention's 512, two warpgroups compute the same scores and
half of the result each.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, Ring, Warpgroup, launch

PIECE = 64  # columns of a matrix
WIDEST_RESULT = 4  # pieces in the registers of a warpgroup
SLOTS = 3  # of the ring
PROCESSORS = 132  # of an H100
MEMORY = 230_000  # bytes of shared memory that a block of threads may take
LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the bias of a slot that is not seen: its exponential is 0 beside LOWEST too


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static of a call. block: slots in a step. readers: warpgroups that compute. group: heads a key head."""

    scale: float
    softcap: float | None
    block: int
    readers: int
    group: int
    interpret: bool

    @property
    def warpgroup(self) -> Warpgroup:
        """Its operations."""
        return Warpgroup(self.interpret)


def _scores(settings: _Settings, product_RS: jax.Array, bias_smem: Any, row: Any) -> jax.Array:
    """Of the rows from `row` on: scaled, capped, and hidden by the bias of each one's token. bias_smem: [T, block]."""
    own, shape, tokens = settings.warpgroup, product_RS.shape, bias_smem.shape[0]
    scores_RS = product_RS * settings.scale
    if settings.softcap is not None:  # tanh(x) = 1 − 2 / (1 + e^2x)
        power_RS = jnp.exp2(scores_RS * (2 * math.log2(math.e) / settings.softcap))
        scores_RS = settings.softcap * (1.0 - 2.0 / (1.0 + power_RS))
    row_RS = own.iota(shape, 0) + row
    for token in range(tokens):
        bias_RS = jax.lax.broadcast_in_dim(own.load(bias_smem.at[token], of_rows=False), shape, [1])
        mine_RS = (row_RS >= token * settings.group) & (row_RS < (token + 1) * settings.group)
        scores_RS = jnp.where(mine_RS, scores_RS + bias_RS, scores_RS) if tokens > 1 else scores_RS + bias_RS
    return scores_RS


def _kernel(settings: _Settings, refs: Any, shared: Any, barriers: Any) -> None:
    q_ref, bias_ref, order_ref, count_ref, *cache_refs, out_ref, lse_ref = refs
    q_smem, bias_smem, out_smem, lse_smem, *cache_smems = shared
    start_barrier, full, free = barriers
    own, block, ring = settings.warpgroup, settings.block, Ring(SLOTS, full, free)
    names = ("batch", "heads", "tiles", "splits", "warpgroup")
    batch, head, tile, split, group = (jax.lax.axis_index(name) for name in names)
    T, splits, pieces = bias_smem.shape[1], out_ref.shape[1], out_ref.shape[4] // PIECE
    k_smem, v_smem, share = cache_smems[0], cache_smems[-1], pieces // settings.readers
    count = count_ref[batch]
    first, stop = jax.lax.div(count * split, jnp.int32(splits)), jax.lax.div(count * (split + 1), jnp.int32(splits))
    rows, exponent = pl.ds(tile * WARPGROUP_ROWS, WARPGROUP_ROWS), math.log2(math.e)

    @pl.when(group < settings.readers)
    def _():
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(start_barrier)

        def of_keys(slot):
            return [(q_smem.at[i], own.transposed(k_smem.at[slot, i])) for i in range(q_smem.shape[0])]

        def step_of(step, carry):
            accs, peak_R, total_R = carry
            slot, shape = ring.wait(step), (WARPGROUP_ROWS, block)
            (product_RS,) = own.products((own.zeros(*shape), lambda: of_keys(slot)))
            scores_RS = _scores(settings, product_RS, bias_smem.at[slot], tile * WARPGROUP_ROWS)
            new_R = jnp.maximum(peak_R, jnp.max(scores_RS, axis=1))
            exp_RS = jnp.exp2((scores_RS - jax.lax.broadcast_in_dim(new_R, shape, [0])) * exponent)
            shrink_R = jnp.exp2((peak_R - new_R) * exponent)
            weights_RS = exp_RS.astype(k_smem.dtype)
            terms = [
                (
                    acc * jax.lax.broadcast_in_dim(shrink_R, acc.shape, [0]),
                    lambda i=i: [(weights_RS, v_smem.at[slot, group * share + i])],
                )
                for i, acc in enumerate(accs)
            ]
            accs = own.products(*terms)
            ring.release(step)
            return accs, new_R, total_R * shrink_R + jnp.sum(exp_RS, axis=1)

        accs = tuple(own.zeros(WARPGROUP_ROWS, PIECE) for _ in range(share))
        carry = accs, own.full(WARPGROUP_ROWS, LOWEST), own.full(WARPGROUP_ROWS, 0.0)
        accs, peak_R, total_R = jax.lax.fori_loop(0, stop - first, step_of, carry)
        some_R = total_R > 0
        safe_R = jnp.where(some_R, total_R, 1.0)
        for i, acc in enumerate(accs):
            columns = pl.ds((group * share + i) * PIECE, PIECE)
            result = acc / jax.lax.broadcast_in_dim(safe_R, acc.shape, [0])
            own.store((result, out_smem.at[group], out_ref.at[batch, split, head, rows, columns]))

        @pl.when(group == 0)
        def _():
            lse_R = jnp.where(some_R, peak_R + jnp.log(safe_R), -jnp.inf)
            own.store((lse_R, lse_smem, lse_ref.at[batch, split, head, rows]))

    @pl.when(group == settings.readers)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for piece in range(q_smem.shape[0]):
            columns = pl.ds(piece * PIECE, PIECE)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, head, rows, columns], q_smem.at[piece], start_barrier)

        @pl.loop(0, stop - first)
        def _(step):
            slot, barrier = ring.claim(step)
            slots = pl.ds(order_ref[batch, first + step] * block, block)
            for ref, smem in zip(cache_refs, cache_smems, strict=True):
                width = smem.shape[1] * PIECE
                for piece in range(smem.shape[1]):
                    columns = pl.ds(head * width + piece * PIECE, PIECE)
                    plgpu.copy_gmem_to_smem(ref.at[batch, slots, columns], smem.at[slot, piece], barrier)
            for token in range(T):
                plgpu.copy_gmem_to_smem(bias_ref.at[batch, token, slots], bias_smem.at[slot, token], barrier)

        ring.drain(stop - first)


class _Pieces(NamedTuple):
    """How keys and values are cut: pieces of each, of values 0 where they are the first of the keys; results: pieces of
    the output; readers: warpgroups that share them."""

    keys: int
    values: int
    results: int
    readers: int

    def block_size(self, tokens: int) -> int | None:
        """Slots in a step: as many as fit shared memory beside the queries and the results; None if too few do."""
        results = WARPGROUP_ROWS * (PIECE * (self.keys * 2 + self.readers * 4) + 4)  # queries have 2 bytes an element
        a_slot = (self.keys + self.values) * PIECE * 2 + tokens * 4
        return next((block for block in (64, 32) if SLOTS * block * a_slot + results <= MEMORY), None)


def _cut(call: Call) -> _Pieces:
    latent, results = len(call.arrays) == 1, -(-call.value_width // PIECE)
    readers = -(-results // WIDEST_RESULT)
    results += -results % readers
    keys = max(-(-call.k_BSGN.shape[-1] // PIECE), results if latent else 0)
    return _Pieces(keys, 0 if latent else results, results, readers)


def gpu_refusal(call: Call) -> str | None:
    """Why the kernel cannot run widths like these, and so many new tokens; None if it can."""
    if call.value_width > 512:
        return f"values {call.value_width} wide do not fit the registers of two warpgroups: at most 512"
    tokens = call.q_BTHN.shape[1]
    if _cut(call).block_size(tokens) is None:
        return (
            f"keys {call.k_BSGN.shape[-1]} and values {call.value_width} wide and {tokens} tokens do not fit "
            f"{MEMORY:,} bytes of shared memory; use 'reference'"
        )
    return None


def gpu_decode_attention(
    call: Call, *, splits: int | None = None, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`. Widths of no whole 64 cost a copy of the cache.

    Args:
      splits: of the slots; by default as many as fill the GPU.
      interpret: runs the kernel without a GPU, slowly; by default wherever there is none.
    """
    q_BTHN, k_BSGN, _, bias_BTS, scale, softcap = call
    (B, T, H, N), (S, G), M, dtype = q_BTHN.shape, k_BSGN.shape[1:3], call.value_width, k_BSGN.dtype
    n, v, m, readers = pieces = _cut(call)
    group, block = H // G, pieces.block_size(T)
    if block is None:
        raise ConfigError(f"implementation='pallas_gpu': {gpu_refusal(call)}")
    interpreted = jax.default_backend() != "gpu" if interpret is None else interpret
    settings = _Settings(scale, softcap, block, readers, group, interpreted)

    def flat(x_BSGN: jax.Array, pieces: int) -> jax.Array:
        # The chip reads zeros past the cache, which it takes 8 rows at a time; the interpreter does not.
        padding = -S % (block if interpreted else 8), pieces * PIECE - x_BSGN.shape[-1]
        padded = jnp.pad(x_BSGN, ((0, 0), (0, padding[0]), (0, 0), (0, padding[1]))) if any(padding) else x_BSGN
        return padded.reshape(B, S + padding[0], -1)

    arrays = [flat(x_BSGN, count) for x_BSGN, count in zip(call.arrays, (n, v), strict=False)]
    R = -(-T * group // WARPGROUP_ROWS) * WARPGROUP_ROWS
    q_BGRN = jnp.moveaxis(q_BTHN.reshape(B, T, G, group, N), 1, 2).reshape(B, G, T * group, N).astype(dtype)
    q_BGRN = jnp.pad(q_BGRN, ((0, 0), (0, 0), (0, R - T * group), (0, n * PIECE - N)))
    bias_BTS = jnp.pad(bias_BTS, ((0, 0), (0, 0), (0, -S % block)), constant_values=-jnp.inf)
    seen_Bn = jnp.any(bias_BTS.reshape(B, T, -1, block) > -jnp.inf, axis=(1, 3))
    order_Bn = jnp.argsort(~seen_Bn, axis=1, stable=True).astype(jnp.int32)  # those that are seen come first
    count_B = jnp.sum(seen_Bn, axis=1, dtype=jnp.int32)
    tiles, blocks = R // WARPGROUP_ROWS, seen_Bn.shape[1]
    splits = splits or max(1, min(blocks, 2 * PROCESSORS // (B * G * tiles)))
    swizzle = min(128, block * dtype.itemsize)
    matrix = functools.partial(settings.warpgroup.matrix, dtype=dtype, swizzle=swizzle)
    shared = [
        matrix(n, WARPGROUP_ROWS, PIECE),
        plgpu.SMEM((SLOTS, T, block), jnp.float32),
        plgpu.SMEM((readers, WARPGROUP_ROWS, PIECE), jnp.float32),
        plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32),
        *[matrix(SLOTS, count, block, PIECE) for count in (n, v)[: len(arrays)]],
    ]
    barriers = [plgpu.Barrier(num_arrivals=n), *Ring.barriers(SLOTS, n + v + T, readers)]

    out_BsGRM, lse_BsGR = launch(
        "decode_attention",
        functools.partial(_kernel, settings),
        {"batch": B, "heads": G, "tiles": tiles, "splits": splits},
        readers + 1,
        (q_BGRN, jnp.maximum(bias_BTS, HIDDEN), order_Bn, count_B, *arrays),
        [((B, splits, G, R, m * PIECE), jnp.float32), ((B, splits, G, R), jnp.float32)],
        shared,
        barriers,
        pl.CostEstimate(2 * B * T * H * S * (N + M), B * T * H * S, sum(x.nbytes for x in (*arrays, q_BGRN, bias_BTS))),
        interpreted,
    )
    lse_BGR = jax.nn.logsumexp(lse_BsGR, axis=1)
    share_BsGR = jnp.exp(lse_BsGR - jnp.where(jnp.isfinite(lse_BGR), lse_BGR, 0)[:, None])
    out_BGRM = jnp.einsum("BsGRM,BsGR->BGRM", out_BsGRM, share_BsGR)[:, :, : T * group, :M]

    def tokens_first(x_BGR: jax.Array) -> jax.Array:
        x_BGTh = x_BGR.reshape(B, G, T, group, *x_BGR.shape[3:])
        return jnp.moveaxis(x_BGTh, 1, 2).reshape(B, T, H, *x_BGR.shape[3:])

    return tokens_first(out_BGRM).astype(dtype), jnp.swapaxes(tokens_first(lse_BGR[:, :, : T * group]), 1, 2)
