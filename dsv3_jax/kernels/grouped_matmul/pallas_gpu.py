"""Grouped matmul on Hopper GPUs: Mosaic GPU kernels over the steps of `schedule.py`.

A block of threads computes two neighbouring tiles of 128 × 128, or for a SwiGLU the tiles of a gate and of its
up-projection, 64 rows of both in the registers of each of two warpgroups, while a third copies the next factors into a
ring in shared memory. A tile of rows that several groups share is visited by each, which writes its own rows alone.
Columns are the inner loop of the grid: the blocks of threads that run at a time share a group's rows and its matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.grouped_matmul.experts import Products, product, routed_experts
from dsv3_jax.kernels.grouped_matmul.quantized import Quantized, Weights, dequantize
from dsv3_jax.kernels.grouped_matmul.schedule import make_schedule
from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, Ring, Warpgroup, launch

READERS = 2  # warpgroups that compute
ROWS = READERS * WARPGROUP_ROWS  # of a tile
COLUMNS = 128  # of a tile
DEPTH = 64  # of what is summed over, in a step of the ring
SLOTS = 4
QUANTIZED_SLOTS = 3  # with the widened tiles, shared memory is full
WIDE = 3  # pairs of tiles that were 8 bits wide: one is multiplied, one may still be, one is written


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static of the kernels."""

    interpret: bool

    @property
    def warpgroup(self) -> Warpgroup:
        """Its operations."""
        return Warpgroup(self.interpret)


def _store(tile_smem: Any, out_ref: Any, values: jax.Array, row: Any, column: Any, first: Any, count: Any) -> None:
    """Writes rows first … first + count of a warpgroup's values to out_ref, whose rows begin at `row`.

    Copies have static sizes: one for each power of two in `count`.
    """
    tile_smem[...] = values.astype(tile_smem.dtype)
    plgpu.commit_smem()
    for length in (1 << power for power in range(WARPGROUP_ROWS.bit_length() - 1, -1, -1)):

        @pl.when((count & length) != 0)
        def _(first=first, length=length):
            rows, columns = pl.ds(row + first, length), pl.ds(column, values.shape[1])
            plgpu.copy_smem_to_gmem(tile_smem.at[pl.ds(first, length)], out_ref.at[rows, columns])

        first += count & length
    plgpu.wait_smem_to_gmem(0)


def _rows_kernel(
    settings: _Settings, epilogue: Any, transposed: bool, apart: int, refs: Any, shared: Any, barriers: Any, *,
    has_factor: bool, is_quantized: bool,
) -> None:  # fmt: skip
    x_ref, w_ref, tile_ref, group_ref, start_ref, count_ref, *refs = refs
    factor_ref = refs.pop(0) if has_factor else None
    scale_ref = refs.pop(0) if is_quantized else None
    x_smem, w_smem, out_smem, factor_smem, *of_quantized = shared
    wide_smem, scale_smem = of_quantized if is_quantized else (w_smem, factor_smem)  # not used then
    own, (full, free, factor_barrier, widened_barrier, scale_barrier) = settings.warpgroup, barriers
    ring = Ring(w_smem.shape[0], full, free)
    step, column, group = (jax.lax.axis_index(name) for name in ("steps", "columns", "warpgroup"))
    tile, expert = tile_ref[step], group_ref[step]
    is_real = step < count_ref[0]
    depths = jnp.where(is_real, x_ref.shape[1] // DEPTH, 0)

    def columns_of(part: int) -> Any:
        return pl.ds((column + apart * part if apart > 1 else 2 * column + part) * COLUMNS, COLUMNS)

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        row = tile * ROWS + group * WARPGROUP_ROWS

        def widen(at, slot):
            """Each warpgroup one of the two tiles."""
            wide_smem[jax.lax.rem(at, jnp.int32(WIDE)), group] = own.widened(w_smem.at[slot, group], wide_smem.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(widened_barrier)
            plgpu.barrier_wait(widened_barrier)

        def factors(at, slot):
            tiles = wide_smem.at[jax.lax.rem(at, jnp.int32(WIDE))] if is_quantized else w_smem.at[slot]
            matrices = [tiles.at[i] for i in range(2)]
            return [(x_smem.at[slot, group], own.transposed(w) if transposed else w) for w in matrices]

        factor_S = None
        if factor_ref is not None:
            rows = pl.ds(row, WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(factor_ref.at[rows], factor_smem.at[group], factor_barrier.at[group])
            plgpu.barrier_wait(factor_barrier.at[group])
            factor_S = own.load(factor_smem.at[group], of_rows=True)
        prepare = widen if is_quantized else None
        pair = own.contraction(ring, depths, [(WARPGROUP_ROWS, COLUMNS)] * 2, factors, prepare)
        if scale_ref is not None:
            plgpu.barrier_wait(scale_barrier)
            scales = [own.load(scale_smem.at[part], of_rows=False) for part in range(2)]
            pair = [y * jax.lax.broadcast_in_dim(scale, y.shape, [1]) for y, scale in zip(pair, scales, strict=True)]
        first = jnp.clip(start_ref[expert] - row, 0, WARPGROUP_ROWS)
        stop = jnp.where(is_real, jnp.clip(start_ref[expert + 1] - row, first, WARPGROUP_ROWS), first)
        for index, block, values in epilogue(column, *pair):
            if factor_S is not None:
                values = values * jax.lax.broadcast_in_dim(factor_S, values.shape, [0])
            _store(out_smem.at[group], refs[index], values, row, block * COLUMNS, first, stop - first)

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        if scale_ref is not None:
            for part in range(2):
                plgpu.copy_gmem_to_smem(scale_ref.at[expert, columns_of(part)], scale_smem.at[part], scale_barrier)

        @pl.loop(0, depths)
        def _(step):
            slot, barrier = ring.claim(step)
            depth = pl.ds(step * DEPTH, DEPTH)
            for part in range(READERS):
                rows = pl.ds(tile * ROWS + part * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], x_smem.at[slot, part], barrier)
            for part in range(2):
                columns = columns_of(part)
                matrix = w_ref.at[expert, columns, depth] if transposed else w_ref.at[expert, depth, columns]
                plgpu.copy_gmem_to_smem(matrix, w_smem.at[slot, part], barrier)

        ring.drain(depths)


def _groups_kernel(settings: _Settings, refs: Any, shared: Any, barriers: Any) -> None:
    x_ref, dy_ref, start_ref, out_ref = refs
    x_smem, dy_smem, out_smem = shared
    *ring_barriers, cleared_barrier = barriers
    own, ring = settings.warpgroup, Ring(SLOTS, *ring_barriers)
    expert, row, column, group = (jax.lax.axis_index(name) for name in ("experts", "rows", "columns", "warpgroup"))
    start, end = start_ref[expert], start_ref[expert + 1]
    first = jax.lax.div(start, jnp.int32(DEPTH))
    depths = jnp.where(end > start, jax.lax.div(end + (DEPTH - 1), jnp.int32(DEPTH)) - first, 0)

    @pl.when(group < READERS)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def clear(step, slot):
            """Rows of other groups, which may hold anything: each warpgroup half of both factors."""
            begin = (first + step) * DEPTH

            @pl.when((begin < start) | (begin + DEPTH > end))
            def _():
                for smem in (x_smem, dy_smem):
                    values = smem[slot, group]
                    row_ids = own.iota(values.shape, 0) + begin
                    smem[slot, group] = jnp.where((row_ids >= start) & (row_ids < end), values, jnp.zeros_like(values))
                plgpu.commit_smem()
                plgpu.barrier_arrive(cleared_barrier)
                plgpu.barrier_wait(cleared_barrier)

        def factors(_, slot):
            x = own.transposed(x_smem.at[slot, group])
            return [(x, dy_smem.at[slot, i]) for i in range(2)]

        pair = own.contraction(ring, depths, [(WARPGROUP_ROWS, COLUMNS)] * 2, factors, clear)
        for part, values in enumerate(pair):
            out_smem[group] = values.astype(out_smem.dtype)
            plgpu.commit_smem()
            rows = pl.ds(row * ROWS + group * WARPGROUP_ROWS, WARPGROUP_ROWS)
            columns = pl.ds((2 * column + part) * COLUMNS, COLUMNS)
            plgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[expert, rows, columns])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == READERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, depths)
        def _(step):
            slot, barrier = ring.claim(step)
            depth = pl.ds((first + step) * DEPTH, DEPTH)
            for part in range(READERS):
                rows = pl.ds(row * ROWS + part * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(x_ref.at[depth, rows], x_smem.at[slot, part], barrier)
            for part in range(2):
                columns = pl.ds((2 * column + part) * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(dy_ref.at[depth, columns], dy_smem.at[slot, part], barrier)

        ring.drain(depths)


def _pad(x: jax.Array, **multiples: int) -> jax.Array:
    """Zeros up to a multiple along dimensions, d0, d1, …; nothing is copied where all divide."""
    widths = [(0, -size % multiples.get(f"d{axis}", 1)) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _row_products(
    settings: _Settings, name: str, epilogue: Callable[..., Any], num_outputs: int, width: int, apart: int, x_ND,
    w_EDF: Weights, sizes_E, *, transposed: bool = False, factor_N: jax.Array | None = None,
) -> list[jax.Array]:  # fmt: skip
    """Outputs [N, width] of x times pairs of tiles of columns: neighbours, or `apart` tiles apart."""
    (num_rows, _), dtype, own = x_ND.shape, x_ND.dtype, settings.warpgroup
    values, scale_E1F = w_EDF if isinstance(w_EDF, Quantized) else (w_EDF, None)
    is_quantized, has_factor = scale_E1F is not None, factor_N is not None
    x_ND = _pad(x_ND, d0=ROWS, d1=DEPTH)
    values = _pad(values, d1=2 * COLUMNS, d2=DEPTH) if transposed else _pad(values, d1=DEPTH, d2=2 * COLUMNS)
    N, padded = len(x_ND), width + -width % (2 * COLUMNS if apart == 1 else COLUMNS)
    steps = make_schedule(sizes_E, N, ROWS, empty=False)
    of_epilogue = [_pad(factor_N.astype(jnp.float32), d0=ROWS)] if factor_N is not None else []
    of_epilogue += [_pad(scale_E1F[:, 0], d1=2 * COLUMNS)] if scale_E1F is not None else []
    slots, tile = QUANTIZED_SLOTS if is_quantized else SLOTS, (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    results = launch(
        name,
        functools.partial(
            _rows_kernel, settings, epilogue, transposed, apart, has_factor=has_factor, is_quantized=is_quantized
        ),
        {"steps": len(steps.tile_S), "columns": padded // COLUMNS // (2 if apart == 1 else 1)},
        READERS + 1,
        (x_ND, values, steps.tile_S, steps.group_S, steps.start_E1, steps.count_1, *of_epilogue),
        [((N, padded), dtype)] * num_outputs,
        [
            own.matrix(slots, READERS, WARPGROUP_ROWS, DEPTH, dtype=dtype),
            own.matrix(slots, 2, *tile, dtype=values.dtype),
            plgpu.SMEM((READERS, WARPGROUP_ROWS, COLUMNS), dtype),
            plgpu.SMEM((READERS, WARPGROUP_ROWS), jnp.float32),
            *([own.matrix(WIDE, 2, *tile, dtype=dtype)] if is_quantized else []),
            *([plgpu.SMEM((2, COLUMNS), jnp.float32)] if is_quantized else []),
        ],
        [
            *Ring.barriers(slots, READERS + 2, READERS),
            plgpu.Barrier(num_barriers=READERS),
            plgpu.Barrier(num_arrivals=READERS),
            plgpu.Barrier(num_arrivals=2),
        ],
        pl.CostEstimate(
            2 * num_rows * x_ND.shape[1] * width * (1 if apart == 1 else 2),
            0 if apart == 1 else num_rows * width,
            x_ND.nbytes + values.nbytes + num_outputs * N * padded * dtype.itemsize,
        ),
        settings.interpret,
    )
    return [result[:num_rows, :width] for result in results]


def _rows(
    settings: _Settings,
    x_ND: jax.Array,
    w_EDF: Weights,
    sizes_E: jax.Array,
    *,
    transposed: bool = False,
    factor_N: jax.Array | None = None,
) -> jax.Array:
    """See `experts.RowsProduct`. Dequantizes a transposed matrix before: its scales are along what is summed over."""
    w_EDF = dequantize(w_EDF, x_ND.dtype) if transposed else w_EDF

    def epilogue(column, left, right):
        return [(0, 2 * column, left), (0, 2 * column + 1, right)]

    width = jax.tree.leaves(w_EDF)[0].shape[1 if transposed else 2]
    more = {"transposed": transposed, "factor_N": factor_N}
    return _row_products(settings, "grouped_rows", epilogue, 1, width, 1, x_ND, w_EDF, sizes_E, **more)[0]


def _swiglu(
    settings: _Settings, x_ND: jax.Array, w_ED2F: Weights, sizes_E: jax.Array, *, save: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """See `experts.SwigluProduct`."""
    F = jax.tree.leaves(w_ED2F)[0].shape[2] // 2
    tiles = max(2, -(-F // COLUMNS))  # of gates: one alone would be a neighbour

    def pad(w_ED2F: jax.Array) -> jax.Array:
        parts = w_ED2F.reshape(*w_ED2F.shape[:2], 2, F)
        return jnp.pad(parts, ((0, 0), (0, 0), (0, 0), (0, tiles * COLUMNS - F))).reshape(*w_ED2F.shape[:2], -1)

    if tiles * COLUMNS != F:  # a copy: gates and up-projections are whole tiles
        w_ED2F = jax.tree.map(pad, w_ED2F)

    def epilogue(column, gate, up):
        hidden = gate / (1.0 + jnp.exp2(gate * -math.log2(math.e))) * up
        return [(index, column, values) for index, values in enumerate([hidden, gate, up] if save else [hidden])]

    outputs = _row_products(
        settings, "grouped_swiglu", epilogue, 3 if save else 1, tiles * COLUMNS, tiles, x_ND, w_ED2F, sizes_E
    )
    hidden_NF, gate_NF, up_NF = [y_NF[:, :F] for y_NF in outputs] if save else [outputs[0][:, :F], None, None]
    return hidden_NF, gate_NF, up_NF


def _groups(settings: _Settings, x_ND: jax.Array, dy_NF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `experts.GroupsProduct`."""
    (_, D), F, dtype, own = x_ND.shape, dy_NF.shape[1], x_ND.dtype, settings.warpgroup
    x_ND, dy_NF = _pad(x_ND, d0=DEPTH, d1=ROWS), _pad(dy_NF, d0=DEPTH, d1=2 * COLUMNS)
    padded = x_ND.shape[1], dy_NF.shape[1]
    start_E1 = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes_E.astype(jnp.int32))])
    (dw_EDF,) = launch(
        "grouped_groups",
        functools.partial(_groups_kernel, settings),
        {"experts": len(sizes_E), "rows": padded[0] // ROWS, "columns": padded[1] // (2 * COLUMNS)},
        READERS + 1,
        (x_ND, dy_NF, start_E1),
        [((len(sizes_E), *padded), dtype)],
        [
            own.matrix(SLOTS, READERS, DEPTH, WARPGROUP_ROWS, dtype=dtype),
            own.matrix(SLOTS, 2, DEPTH, COLUMNS, dtype=dtype),
            own.matrix(READERS, WARPGROUP_ROWS, COLUMNS, dtype=dtype),
        ],
        [*Ring.barriers(SLOTS, READERS + 2, READERS), plgpu.Barrier(num_arrivals=READERS)],
        pl.CostEstimate(
            2 * len(x_ND) * D * F, 0, x_ND.nbytes + dy_NF.nbytes + len(sizes_E) * math.prod(padded) * dtype.itemsize
        ),
        settings.interpret,
    )
    return dw_EDF[:, :D, :F]


def gpu_products(interpret: bool | None = None) -> Products:
    """The kernels.

    Args:
      interpret: by default, wherever the platform is not a GPU.
    """
    return _products(_Settings(jax.default_backend() != "gpu" if interpret is None else interpret))


@functools.cache  # the same object for the same settings: jax traces again what it is given anew
def _products(settings: _Settings) -> Products:
    of = functools.partial
    return Products(of(_swiglu, settings), of(_rows, settings), of(_groups, settings))


def gpu_experts(*operands: Any, interpret: bool | None = None, **options: Any) -> jax.Array:
    """See `api.grouped_experts`, and `gpu_products` for `interpret`."""
    return routed_experts(gpu_products(interpret), *operands, **options)


def gpu_matmul(x_ND: jax.Array, w_EDF: Weights, group_sizes_E: jax.Array, interpret: bool | None = None) -> jax.Array:
    """See `api.pick_matmul`, and `gpu_products` for `interpret`."""
    return product(gpu_products(interpret), x_ND, w_EDF, group_sizes_E)
