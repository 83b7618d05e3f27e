"""Attention by pattern on Hopper GPUs: Mosaic GPU kernels in the manner of FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608).

A block of threads owns 128 queries (keys, for the gradients of keys and values), 64 for each of two warpgroups; a third
warpgroup copies blocks of the other side into a ring in shared memory. Which blocks those are follows from the queries'
intervals at run time: none that no query sees. While one warpgroup exponentiates, the other multiplies. There are two
backward kernels rather than one that adds up gradients of queries in memory: results do not depend on timing.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.hopper import SWIZZLE_BYTES, WARPGROUP_ROWS, Ring, launch
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.global_set import attend_with_globals
from dsv3_jax.kernels.windowed_attention.gpu_kernels import (
    OWNED,
    READERS,
    Block,
    Blocks,
    Settings,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
)
from dsv3_jax.kernels.windowed_attention.intervals import (
    key_blocks,
    num_block_pairs,
    query_blocks,
    visible_interval,
    whole_key_blocks,
    whole_query_blocks,
)

PIECE = 64  # elements in a swizzled row: widths are multiples of it
WIDEST = 320  # key width + value width whose gradients fit the registers of a warpgroup
WIDEST_PRODUCT = 256  # columns of one `wgmma`


def _call(
    kernel: Any, settings: Settings, heads: int, inputs: Any, outputs: Any, shared: Any, barriers: Any, pairs: int,
    multiplied: int,
) -> Any:  # fmt: skip
    """Runs a kernel, a block of threads for each batch row, head and block of OWNED rows.

    inputs: queries, keys and values, and more. outputs: (shape, dtype) of each. pairs: of `Settings`. multiplied:
    widths of the products of a pair, together.
    """
    (B, T, H, N), M, dtype = inputs[0].shape, inputs[2].shape[-1], inputs[0].dtype
    grid = {"batch": B, "heads": heads, "blocks": T // OWNED}
    body, pairs = functools.partial(kernel, settings), B * H * pairs
    written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in outputs)
    loaded = (pairs // OWNED + B * H * T) * (N + M) * dtype.itemsize  # of the other side, and of one's own
    cost = pl.CostEstimate(2 * pairs * multiplied, pairs, loaded + written)
    return launch(kernel.__name__, body, grid, READERS + 1, inputs, outputs, shared, barriers, cost, settings.interpret)


def _start_barrier(copies: int) -> Any:
    return plgpu.Barrier(num_arrivals=copies, num_barriers=READERS)


def _run_forward(settings: Settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    """out_BTHM, and the binary logarithms that the backward kernels take, [B, H, T]."""
    (B, T, H, N), M = q_BTHN.shape, v_BTGM.shape[-1]
    own, (block, slots), dtype = settings.warpgroup, settings.blocks.forward, q_BTHN.dtype
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
    blocks = whole_key_blocks(first_BT, last_BT, S, block), key_blocks(first_BT, last_BT, OWNED, block)
    return _call(
        forward_kernel,
        settings,
        H,
        (q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT, *blocks),
        [((B, T, H, M), dtype), ((B, H, T), jnp.float32)],
        shared,
        [_start_barrier(3), *ring, *ring, plgpu.Barrier(num_arrivals=READERS)],
        settings.pairs[0],
        N + M,
    )


def _run_backward(settings: Settings, saved: Any, cotangents: Any):
    q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT, out_BTHM, lse_BHT = saved
    dout_BTHM, dlse_BHT = cotangents
    (B, T, H, N), (G, M), dtype = q_BTHN.shape, v_BTGM.shape[2:], q_BTHN.dtype
    # d scores = weights · (dout · v + offset), offset = dlse − Σ dout · out
    delta_BTH = jnp.sum(dout_BTHM.astype(jnp.float32) * out_BTHM.astype(jnp.float32), axis=-1)
    offset_BHT = dlse_BHT - jnp.swapaxes(delta_BTH, 1, 2)
    lse_BHT = jnp.where(jnp.isfinite(lse_BHT), lse_BHT, jnp.inf)  # weights of 0 where none is seen
    own, S, (_, dq, dkv) = settings.warpgroup, WARPGROUP_ROWS, settings.blocks
    given = q_BTHN, k_BTGN, v_BTGM, dout_BTHM, lse_BHT, offset_BHT, first_BT, last_BT

    def vectors(count: int, block: int) -> list[Any]:
        return [plgpu.SMEM((count, block), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)]

    of_queries = whole_key_blocks(first_BT, last_BT, S, dq.rows), key_blocks(first_BT, last_BT, OWNED, dq.rows)
    (dq_BTHN,) = _call(
        dq_kernel,
        settings,
        H,
        (*given, *of_queries),
        [((B, T, H, N), dtype)],
        [
            own.matrix(READERS, S, N, dtype=dtype),
            own.matrix(READERS, S, M, dtype=dtype),
            own.matrix(dq.slots, dq.rows, N, dtype=dtype),
            own.matrix(dq.slots, dq.rows, M, dtype=dtype),
            *vectors(READERS, S),
        ],
        [_start_barrier(6), *Ring.barriers(dq.slots, 2, READERS)],
        settings.pairs[1],
        2 * N + M,
    )
    narrow = functools.partial(own.matrix, dtype=dtype, swizzle=min(SWIZZLE_BYTES, dkv.rows * dtype.itemsize))
    of_keys = whole_query_blocks(first_BT, last_BT, dkv.rows, S), query_blocks(first_BT, last_BT, dkv.rows, OWNED)
    dk_BTGN, dv_BTGM = _call(
        dkv_kernel,
        settings,
        G,
        (*given, *of_keys),
        [((B, T, G, N), dtype), ((B, T, G, M), dtype)],
        [
            narrow(READERS, S, N),
            narrow(READERS, S, M),
            narrow(dkv.slots, dkv.rows, N),
            narrow(dkv.slots, dkv.rows, M),
            *vectors(dkv.slots, dkv.rows),
        ],
        [_start_barrier(2), *Ring.barriers(dkv.slots, 6, READERS)],
        settings.pairs[2],
        2 * (N + M),
    )
    return dq_BTHN, dk_BTGN, dv_BTGM, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(settings, q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT)[0]


def _attend_forward(settings: Settings, *inputs):
    out, lse = _run_forward(settings, *inputs)
    return (out, lse * math.log(2)), (*inputs, out, lse)


_attend.defvjp(_attend_forward, _run_backward)


def block_sizes(key_width: int, value_width: int, softcap: float | None = None) -> Blocks:
    """The fastest that were tried on an H100, of 32,768 tokens and a window of 4096, and that fit shared memory. Widths
    as `padded_widths` gives them."""
    if key_width + value_width > 256 or max(key_width, value_width) > 128:
        return Blocks(Block(64, 2), Block(64, 2), Block(32, 3))
    return Blocks(Block(128, 2), Block(128 if softcap is None else 64, 2), Block(64 if softcap is None else 32, 3))


def padded_widths(key_width: int, value_width: int) -> tuple[int, int]:
    """Of keys and values in the kernels: multiples of 64."""
    return key_width + -key_width % PIECE, value_width + -value_width % PIECE


def gpu_attention(
    call: Call, *, blocks: Blocks | None = None, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`.

    Args:
      blocks: by default `block_sizes`.
      interpret: runs the kernels without a GPU, slowly (see `api.refusal`); by default wherever there is none.
    """

    def local(call: Call):
        (T, _, N), M = call.q_BTHN.shape[1:], call.v_BTGM.shape[-1]

        def pad(x_BTHN: jax.Array) -> jax.Array:
            return jnp.pad(x_BTHN, ((0, 0), (0, -T % OWNED), (0, 0), (0, -x_BTHN.shape[-1] % PIECE)))

        q_BTHN, k_BTGN, v_BTGM = pad(call.q_BTHN), pad(call.k_BTGN), pad(call.v_BTGM)
        first_BT, last_BT = visible_interval(call.pattern, call.causal, call.place)
        first_BT = jnp.pad(first_BT, ((0, 0), (0, -T % OWNED)), constant_values=T)
        last_BT = jnp.pad(last_BT, ((0, 0), (0, -T % OWNED)), constant_values=-1)
        sizes = blocks or block_sizes(*padded_widths(N, M), call.softcap)
        interpreted = jax.default_backend() != "gpu" if interpret is None else interpret

        def pairs_of(q_block: int, k_block: int) -> int:
            length = first_BT.shape[1]
            return num_block_pairs(call.pattern, call.causal, length, q_block, k_block) * q_block * k_block

        pairs = (
            pairs_of(OWNED, sizes.forward.rows),
            pairs_of(OWNED, sizes.dq.rows),
            pairs_of(sizes.dkv.rows, OWNED),
        )
        settings = Settings(call.scale, call.softcap, sizes, pairs, interpreted)
        given = q_BTHN, k_BTGN, v_BTGM, first_BT, last_BT
        out_BTHM, lse_BHT = cast(tuple[jax.Array, jax.Array], _attend(settings, *given))
        return out_BTHM[:, :T, :, :M], lse_BHT[:, :, :T]

    return attend_with_globals(local, call)
