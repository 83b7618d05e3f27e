"""Grouped matmul on TPU: Pallas kernels over the steps of `schedule.py`.

A kernel holds the whole of what a product sums over, of a tile of rows and of a block of a group's columns. The columns
are the outer loop and a group's steps follow each other, so that every matrix is read once; the rows are read once for
every block of columns. Within a tile only the chunks of rows that meet the group are multiplied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul.experts import Products, product, routed_experts
from dsv3_jax.kernels.grouped_matmul.quantized import Quantized, Weights
from dsv3_jax.kernels.grouped_matmul.schedule import Schedule, make_schedule

LANES = 128
ROWS = 512  # of a tile
CHUNK = 128  # rows that are multiplied at a time
LARGEST_BODY = 2**29  # products that the compiler lays out as one piece of code
MEMORY = 60 * 2**20  # bytes on the chip that a kernel may take, of 64 MiB (v5p, TPU7x) or 128 MiB (v5e, v6e)
BUFFERS = 48 * 2**20  # of them for blocks of arrays
WIDEST = 2048  # columns


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static of the kernels."""

    interpret: bool
    block: int  # rows of a tile
    columns: int | None  # of a block, where given


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one dimension of each, in float32; float32 inputs at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class _Step:
    """One step of a schedule: which rows of the tile are the group's, and where the group's steps begin and end."""

    def __init__(self, schedule_refs: Any, axis: int, block: int, chunk: int):
        self.chunk = chunk
        tile_ref, group_ref, start_ref, count_ref = schedule_refs
        step, steps = pl.program_id(axis), pl.num_programs(axis)
        tile, group = tile_ref[step], group_ref[step]
        self.is_first = (step == 0) | (group_ref[jnp.maximum(step - 1, 0)] != group)
        self.is_last = (step == steps - 1) | (group_ref[jnp.minimum(step + 1, steps - 1)] != group)
        self.is_empty = start_ref[group + 1] == start_ref[group]
        real = step < count_ref[0]
        self.low = jnp.maximum(start_ref[group] - tile * block, 0)
        self.high = jnp.where(real, jnp.minimum(start_ref[group + 1] - tile * block, block), 0)

    def for_chunks(self, body: Callable[[Any, Any, Any], None]) -> None:
        """body(rows, own, is_first): for each chunk of rows that meets the group; own_c1: which of them are its own."""
        first = jax.lax.div(self.low, self.chunk)

        def each(index: Any, _: None) -> None:
            start = pl.multiple_of(index * self.chunk, self.chunk)
            row_c1 = jax.lax.broadcasted_iota(jnp.int32, (self.chunk, 1), 0) + start
            own_c1 = (row_c1 >= self.low) & (row_c1 < self.high)
            body(pl.ds(start, self.chunk), own_c1, self.is_first & (index == first))

        jax.lax.fori_loop(first, jax.lax.div(self.high + self.chunk - 1, self.chunk), each, None)


def _for_pieces(size: int, products: int, body: Callable[[Any], None]) -> None:
    """body(slice) over pieces of a dimension, each element of which takes so many products."""
    fitting = [piece for piece in range(2 * LANES, size + 1, 2 * LANES) if size % piece == 0]
    piece = max([piece for piece in fitting if piece * products <= LARGEST_BODY] or fitting[:1] or [size])

    def each(index: Any, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * piece, piece), piece))

    if piece == size:
        body(slice(None))
    else:
        jax.lax.fori_loop(0, size // piece, each, None)


def _rows_kernel(
    epilogue, transposed, block, chunk, tile_ref, group_ref, start_ref, count_ref,
    x_ref, w_refs, scale_refs, factor_refs, out_refs, *wide_refs,
):  # fmt: skip
    """epilogue(products with each matrix) * factor, for the rows of the group."""
    step = _Step((tile_ref, group_ref, start_ref, count_ref), 1, block, chunk)
    if scale_refs:

        @pl.when(step.is_first)
        def _():
            for wide_ref, w_ref, scale_ref in zip(wide_refs, w_refs, scale_refs, strict=True):
                wide_ref[...] = (w_ref[...].astype(jnp.float32) * scale_ref[...]).astype(wide_ref.dtype)

        w_refs = wide_refs

    def body(rows: Any, own_c1: jax.Array, _: Any) -> None:
        # From along the lanes to down the sublanes, the same in all lanes.
        factors = [jnp.transpose(jnp.broadcast_to(ref[:, rows], (LANES, chunk))) for ref in factor_refs]

        def columns_body(columns: Any) -> None:
            part = (columns, slice(None)) if transposed else (slice(None), columns)
            results = epilogue(*(_dot(x_ref[rows, :], w_ref[part], (1, int(transposed))) for w_ref in w_refs))
            for factor_cl in factors:
                width = results[0].shape[1]
                results = [result * jnp.tile(factor_cl, (1, pl.cdiv(width, LANES)))[:, :width] for result in results]
            for out_ref, result in zip(out_refs, results, strict=True):
                kept = out_ref[rows, columns].astype(jnp.float32)  # of other groups in this tile
                out_ref[rows, columns] = jnp.where(own_c1, result, kept).astype(out_ref.dtype)

        _for_pieces(out_refs[0].shape[1], chunk * x_ref.shape[1], columns_body)

    step.for_chunks(body)


def _groups_kernel(block, chunk, tile_ref, group_ref, start_ref, count_ref, x_ref, dy_ref, out_ref, acc_ref):
    """Σ xᵀ · dy over the rows of a group."""
    step = _Step((tile_ref, group_ref, start_ref, count_ref), 2, block, chunk)

    def body(rows: Any, own_c1: jax.Array, is_first: Any) -> None:
        def own(x: jax.Array) -> jax.Array:
            """Both are cleared: what is not the group's may be anything, and 0 · NaN is NaN."""
            return jnp.where(own_c1, x.astype(jnp.float32), 0.0).astype(x.dtype)

        def part_body(part: Any) -> None:
            sum_DF = _dot(own(x_ref[rows, part]), own(dy_ref[rows, :]), (0, 0))
            acc_ref[part, :] = jnp.where(is_first, 0.0, acc_ref[part, :]) + sum_DF

        _for_pieces(acc_ref.shape[0], chunk * acc_ref.shape[1], part_body)

    step.for_chunks(body)

    @pl.when(step.is_last)
    def _():
        out_ref[...] = jnp.where(step.is_empty, 0.0, acc_ref[...]).astype(out_ref.dtype)


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Of a block on the chip, where the last dimension fills whole lanes."""
    *major, minor = shape
    size = -(-minor // LANES) * LANES * jnp.dtype(dtype).itemsize
    for dim in major:
        size *= dim
    return size


def block_columns(width: int, needed: Callable[[int], int], given: int | None = None) -> int:
    """The most columns, at most `WIDEST`, for which needed(columns) bytes fit on the chip.

    They divide the width and fill whole lanes, or are all of it. For DeepSeek-V3's experts, D 7168 and F 2048 in
    bfloat16: 512 of gate and of up, 1792 of the last product, 1024 and 1792 of the gradients of what these sum over;
    1024 by 2048 and 1024 by 1792 of the matrices' gradients. The compilers for v5p and v6e take them; which are fastest
    was not measured.

    Raises:
      ConfigError: nothing fits.
    """
    if given is not None:
        return min(given, width)
    whole = [width] if width <= WIDEST else []
    parts = [columns for columns in range(WIDEST, 0, -LANES) if width % columns == 0 or width % LANES]
    for columns in [*whole, *parts]:
        if needed(columns) <= BUFFERS:
            return columns
    raise ConfigError(
        f"config.model.moe.dispatch.implementation='pallas_tpu': {min(width, LANES)} columns with all they sum over "
        f"take {needed(min(width, LANES)):,} bytes of {BUFFERS:,} on the chip; use smaller widths, or 'ragged_dot'"
    )


def _call(
    kernel: Any, settings: _Settings, schedule: Schedule, columns: tuple[int, ...], inputs: Any, outputs: Any,
    scratch: Any, cost: pl.CostEstimate, name: str,
) -> Any:  # fmt: skip
    """Runs a kernel over the grid (*columns, steps). inputs, outputs: trees of (array or its shape, spec)."""
    pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], pl.BlockSpec)  # noqa: E731
    firsts, seconds = (functools.partial(jax.tree.map, lambda x, i=i: x[i], is_leaf=pair) for i in (0, 1))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(schedule),
        grid=(*columns, len(schedule.tile_S)),
        in_specs=seconds(inputs),
        out_specs=seconds(outputs),
        scratch_shapes=scratch,
    )
    run = pl.pallas_call(
        kernel,
        firsts(outputs),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(columns) + ("arbitrary",), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=cost,
        interpret=settings.interpret,
        name=name,
    )
    return run(*schedule, *firsts(inputs))


def _backward_chunk(block: int) -> int:
    """Rows that are multiplied at a time where an operand is transposed, which more rows have to pay for."""
    return 2 * CHUNK if block % (2 * CHUNK) == 0 else CHUNK


def _padded_rows(x_ND: jax.Array) -> jax.Array:
    return jnp.pad(x_ND, ((0, -len(x_ND) % CHUNK), *[(0, 0)] * (x_ND.ndim - 1)))


def _row_products(
    settings: _Settings,
    name: str,
    epilogue: Callable[..., Any],
    num_outputs: int,
    x_ND: jax.Array,
    matrices: list[Weights],
    offsets: list[int],
    width: int,
    sizes_E: jax.Array,
    *,
    transposed: bool = False,
    factor_N: jax.Array | None = None,
) -> list[jax.Array]:
    """epilogue(x · each matrix) * factor, [N, width] each. offsets: of a matrix's columns, in widths."""
    num_rows, dtype = len(x_ND), x_ND.dtype
    x_ND = _padded_rows(x_ND)
    (N, D), (E,) = x_ND.shape, sizes_E.shape
    block = min(settings.block, N)
    chunk = _backward_chunk(block) if transposed else CHUNK
    quantized = isinstance(matrices[0], Quantized)
    values = [w.values if isinstance(w, Quantized) else w for w in matrices]

    def matrix_shape(columns: int) -> tuple[int, int]:
        return (columns, D) if transposed else (D, columns)

    def needed(columns: int) -> int:
        of_matrix = 2 * _bytes(matrix_shape(columns), values[0].dtype)
        of_matrix += quantized * _bytes(matrix_shape(columns), dtype)
        of_rows = _bytes((block, D), dtype) + num_outputs * _bytes((block, columns), dtype)
        return len(values) * of_matrix + 2 * of_rows

    columns = block_columns(width, needed, settings.columns)
    blocks = pl.cdiv(width, columns)

    def of_rows(last: int, by_column: bool) -> pl.BlockSpec:
        return pl.BlockSpec((block, last), lambda c, s, tile, *_: (tile[s], c if by_column else 0))

    def of_matrix(offset: int) -> pl.BlockSpec:
        def index(c, s, tile, group, *_):
            place = offset * blocks + c
            return (group[s], place, 0) if transposed else (group[s], 0, place)

        return pl.BlockSpec((None, *matrix_shape(columns)), index)

    def of_scale(offset: int) -> pl.BlockSpec:
        def index(c, s, tile, group, *_):
            return group[s], 0, 0 if transposed else offset * blocks + c

        return pl.BlockSpec((None, 1, D if transposed else columns), index)

    of_factor = pl.BlockSpec((1, block), lambda c, s, tile, *_: (0, tile[s]))
    scales = [w.scale for w in matrices if isinstance(w, Quantized)]
    factors = [] if factor_N is None else [_padded_rows(factor_N)[None]]
    steps = make_schedule(sizes_E, N, block, empty=False)
    read = blocks * x_ND.size * dtype.itemsize + sum(min(E, N) * D * width * w.dtype.itemsize for w in values)
    (results,) = _call(
        functools.partial(_rows_kernel, epilogue, transposed, block, chunk),
        settings,
        steps,
        (blocks,),
        (
            (x_ND, of_rows(D, False)),
            [(w, of_matrix(offset)) for w, offset in zip(values, offsets, strict=True)],
            [(scale, of_scale(offset)) for scale, offset in zip(scales, offsets, strict=False)],
            [(factor, of_factor) for factor in factors],
        ),
        ([(jax.ShapeDtypeStruct((N, width), dtype), of_rows(columns, True))] * num_outputs,),
        [pltpu.VMEM(matrix_shape(columns), dtype) for _ in scales],
        pl.CostEstimate(
            2 * N * D * width * len(values),
            N * width * (len(values) - 1),
            read + num_outputs * N * width * dtype.itemsize,
        ),
        name,
    )
    return [result[:num_rows] for result in results]


def _rows(
    settings: _Settings,
    x_ND: jax.Array,
    w_EDF: Weights,
    sizes_E: jax.Array,
    *,
    transposed: bool = False,
    factor_N: jax.Array | None = None,
) -> jax.Array:
    """See `experts.RowsProduct`."""
    width = jax.tree.leaves(w_EDF)[0].shape[1 if transposed else 2]
    more = {"transposed": transposed, "factor_N": factor_N}
    (y_NF,) = _row_products(settings, "grouped_rows", lambda y: [y], 1, x_ND, [w_EDF], [0], width, sizes_E, **more)
    return y_NF


def _swiglu(
    settings: _Settings, x_ND: jax.Array, w_ED2F: Weights, sizes_E: jax.Array, *, save: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """See `experts.SwigluProduct`."""
    F = jax.tree.leaves(w_ED2F)[0].shape[2] // 2
    padding = -F % LANES

    def padded(w_ED2F: jax.Array) -> jax.Array:
        parts = w_ED2F.reshape(*w_ED2F.shape[:2], 2, F)
        return jnp.pad(parts, ((0, 0), (0, 0), (0, 0), (0, padding))).reshape(*w_ED2F.shape[:2], -1)

    if padding:  # a copy: gates and up-projections begin at whole lanes
        w_ED2F = jax.tree.map(padded, w_ED2F)

    def epilogue(gate: jax.Array, up: jax.Array) -> list[jax.Array]:
        hidden = jax.nn.silu(gate) * up
        return [hidden, gate, up] if save else [hidden]

    outputs = _row_products(
        settings, "grouped_swiglu", epilogue, 3 if save else 1, x_ND, [w_ED2F] * 2, [0, 1], F + padding, sizes_E
    )
    hidden_NF, *saved = (y_NF[:, :F] for y_NF in outputs)
    gate_NF, up_NF = saved or (None, None)
    return hidden_NF, gate_NF, up_NF


def _groups(settings: _Settings, x_ND: jax.Array, dy_NF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `experts.GroupsProduct`."""
    x_ND, dy_NF, dtype = _padded_rows(x_ND), _padded_rows(dy_NF), x_ND.dtype
    (N, D), F, (E,) = x_ND.shape, dy_NF.shape[1], sizes_E.shape
    block = min(settings.block, N)

    def needed(d: int, f: int) -> int:
        of_rows = _bytes((block, d), dtype) + _bytes((block, f), dtype)
        return 2 * of_rows + 2 * _bytes((d, f), dtype) + 2 * _bytes((d, f), jnp.float32)

    f = block_columns(F, lambda f: needed(min(D, LANES * 8), f), settings.columns)
    d = block_columns(D, lambda d: needed(d, f), settings.columns)
    blocks = pl.cdiv(D, d), pl.cdiv(F, f)
    steps = make_schedule(sizes_E, N, block, empty=True)
    moved = N * (blocks[1] * D + blocks[0] * F) + E * D * F
    return _call(
        functools.partial(_groups_kernel, block, _backward_chunk(block)),
        settings,
        steps,
        blocks,
        (
            (x_ND, pl.BlockSpec((block, d), lambda i, j, s, tile, *_: (tile[s], i))),
            (dy_NF, pl.BlockSpec((block, f), lambda i, j, s, tile, *_: (tile[s], j))),
        ),
        (
            jax.ShapeDtypeStruct((E, D, F), dtype),
            pl.BlockSpec((None, d, f), lambda i, j, s, tile, group, *_: (group[s], i, j)),
        ),
        [pltpu.VMEM((d, f), jnp.float32)],
        pl.CostEstimate(2 * N * D * F, 0, moved * dtype.itemsize),
        "grouped_groups",
    )


def tpu_products(interpret: bool | None = None, block: int = ROWS, columns: int | None = None) -> Products:
    """The kernels.

    Args:
      interpret: by default, wherever the platform is not a TPU.
      block: rows of a tile, a multiple of 128. columns: of a block; by default `block_columns`.
    """
    if block % CHUNK:
        raise ValueError(f"block={block}: must be a multiple of {CHUNK}")
    return _products(_Settings(jax.default_backend() != "tpu" if interpret is None else interpret, block, columns))


@functools.cache  # the same object for the same settings: jax traces again what it is given anew
def _products(settings: _Settings) -> Products:
    of = functools.partial
    return Products(of(_swiglu, settings), of(_rows, settings), of(_groups, settings))


def tpu_experts(*operands: Any, interpret: bool | None = None, **options: Any) -> jax.Array:
    """See `api.grouped_experts`, and `tpu_products` for `interpret`."""
    return routed_experts(tpu_products(interpret), *operands, **options)


def tpu_matmul(x_ND: jax.Array, w_EDF: Weights, group_sizes_E: jax.Array, interpret: bool | None = None) -> jax.Array:
    """See `api.pick_matmul`, and `tpu_products` for `interpret`."""
    return product(tpu_products(interpret), x_ND, w_EDF, group_sizes_E)
