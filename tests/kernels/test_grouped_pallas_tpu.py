"""The TPU kernels of grouped matmul, interpreted: schedule, blocks, hard inputs, precision, several devices.

The cases that every implementation runs are in `tests/ops/dispatch_cases.py` and `test_padded_matmul.py`, quantized
weights in `test_quantized_experts.py`, compilation for TPUs in `test_tpu_compilation.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.grouped_matmul import api, grouped_experts, pick_matmul
from dsv3_jax.kernels.grouped_matmul.pallas_tpu import block_columns, tpu_experts, tpu_matmul, tpu_products
from dsv3_jax.kernels.grouped_matmul.schedule import make_schedule, max_steps
from dsv3_jax.sharding import make_mesh
from tests.conftest import assert_close, fresh_key
from tests.kernels.pallas_calls import calls
from tests.ops.dispatch_cases import CASES, operands, outputs_and_gradients, run

SIZES = {
    "within a tile": (3, 0, 5, 1),
    "to the end of a tile": (8, 8, 0, 8),
    "over tiles": (0, 19, 2, 11),
    "none": (0, 0, 0, 0),
    "the last alone, past a gap": (0, 0, 0, 17),
    "the first alone": (32, 0, 0, 0),
}


@pytest.mark.quick
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_every_group_meets_its_tiles_once_and_in_order(case, empty):
    sizes, rows, block = np.array(SIZES[case]), 32, 8
    found = make_schedule(jnp.asarray(sizes), rows, block, empty=empty)
    end = np.cumsum(sizes)
    expected = []
    for group, (start, stop) in enumerate(zip(end - sizes, end, strict=True)):
        tiles = sorted({row // block for row in range(start, stop)})
        expected += [(min(start // block, 3), group)] if empty and not tiles else [(tile, group) for tile in tiles]
    count = int(found.count_1[0])
    steps = list(zip(np.asarray(found.tile_S).tolist(), np.asarray(found.group_S).tolist(), strict=True))
    assert steps[:count] == expected and len(steps) == max_steps(rows, 4, block, empty) >= count
    assert len(set(steps[max(count - 1, 0) :])) == 1, "steps past the last load nothing"
    assert all(0 <= tile < rows // block for tile, _ in steps)
    np.testing.assert_array_equal(found.start_E1, [0, *end])


@pytest.mark.quick
def test_steps_grow_with_rows_not_with_rows_times_experts():
    def steps(rows: int, experts: int) -> int:
        sizes = jnp.asarray(np.bincount(np.random.default_rng(0).integers(0, experts, rows), minlength=experts))
        return int(make_schedule(sizes, rows, 512, empty=False).count_1[0])

    assert steps(32768, 32) <= 64 + 31 and steps(262144, 256) <= 512 + 255
    assert steps(32768, 256) <= 64 + 255, "eight times the experts, less than four times the steps"
    assert steps(2 * 32768, 32) - steps(32768, 32) == 64
    assert max_steps(8, 256, 512, False) == 8, "one token of eight experts does not step through 256"


def products(block: int, columns: int | None = None):
    return tpu_products(interpret=True, block=block, columns=columns)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def three(block: int, columns: int, save: bool, x_ND, w_EDF, dy_NF, sizes_E, factor_N):
    """The three primitive products and the transposed one, F = 2 · 128."""
    of = products(block, columns)
    swiglu = of.swiglu(x_ND, w_EDF, sizes_E, save=save)
    rows = of.rows(x_ND, w_EDF, sizes_E, factor_N=factor_N)
    back = of.rows(dy_NF, w_EDF, sizes_E, transposed=True)
    return [y for y in (*swiglu, rows, back) if y is not None], of.groups(x_ND, dy_NF, sizes_E)


def drawn(N: int, E: int, D: int, F: int, dtype=jnp.float32):
    keys = jax.random.split(fresh_key(3), 4)
    shapes = ((N, D), (E, D, F), (N, F), (N,))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(x, w, dy, sizes, factor):
    """In float64, over the rows that are in groups."""
    x, w, dy, factor = (np.asarray(a, np.float64) for a in (x, w, dy, factor))
    group = np.repeat(np.arange(len(sizes)), sizes)
    n, F = len(group), w.shape[2] // 2
    y = np.einsum("nd,ndf->nf", x[:n], w[group])
    gate, up = y[:, :F], y[:, F:]
    groups = np.stack([x[:n][group == e].T @ dy[:n][group == e] for e in range(len(sizes))])
    rows = y * factor[:n, None]
    return [gate / (1 + np.exp(-gate)) * up, gate, up, rows, np.einsum("nf,ndf->nd", dy[:n], w[group])], groups


@pytest.mark.parametrize(
    ("block", "columns"),
    [(128, 128), pytest.param(256, 128, marks=pytest.mark.slow), pytest.param(512, 512, marks=pytest.mark.slow)],
)
def test_rows_past_the_groups_may_hold_anything_and_blocks_be_of_any_size(block, columns):
    """D = 200 is no multiple of a block's columns; 413 rows are none of a tile's."""
    N, sizes = 413, np.array([70, 0, 200, 1, 59])
    x, w, dy, factor = drawn(N, 5, 200, 256)
    expected = by_hand(x, w, dy, sizes, factor)
    inside = np.arange(N) < sizes.sum()
    poisoned = [jnp.where(inside.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.nan) for a in (x, dy, factor)]
    rows, groups = three(block, columns, True, poisoned[0], w, poisoned[1], jnp.asarray(sizes), poisoned[2])
    assert all(y.shape[0] == N for y in rows)
    assert_close(([y[inside] for y in rows], groups), expected, 3e-6)
    np.testing.assert_array_equal(groups[1], 0)


def test_a_group_is_computed_alike_whatever_the_others_hold():
    """To the bit: nothing of another group, infinite or not, reaches it, and sums have one order."""
    sizes, (x, w, dy, factor) = np.array([70, 0, 200, 1, 59]), drawn(413, 5, 200, 256)
    mine = (np.arange(413) >= 70) & (np.arange(413) < 270)
    run = lambda x, w, dy: three(128, 128, True, x, w, dy, jnp.asarray(sizes), factor)  # noqa: E731
    rows, groups = run(x, w, dy)
    other_w = jnp.where(jnp.arange(5)[:, None, None] == 2, w, jnp.inf)
    changed, changed_groups = run(*(jnp.where(mine[:, None], a, jnp.nan) for a in (x,)), other_w, dy)
    for y, other in zip(rows, changed, strict=True):
        np.testing.assert_array_equal(y[mine], other[mine])
    np.testing.assert_array_equal(groups[2], changed_groups[2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_errors_are_those_of_a_plain_product(dtype):
    """Against float64: at most 1.5 times the largest error of XLA's own product of the same operands and dtype, both of
    which round a float32 sum once; the order of the sums is not the same."""
    sizes, (x, w, dy, _) = np.array([100, 156]), drawn(256, 2, 512, 256, dtype)
    rows, groups = three(256, 256, False, x, w, dy, jnp.asarray(sizes), jnp.ones(256))
    expected, expected_groups = by_hand(x, w, dy, sizes, jnp.ones(256))
    group = np.repeat(np.arange(2), sizes)
    dot = functools.partial(jax.lax.dot, preferred_element_type=jnp.float32, precision="highest")
    plain = [
        jnp.stack([dot(x, w_DF).astype(dtype) for w_DF in w], 1)[np.arange(256), group],
        jnp.stack([dot(dy, w_DF.T).astype(dtype) for w_DF in w], 1)[np.arange(256), group],
        jnp.stack([dot(x[group == e].T, dy[group == e]).astype(dtype) for e in range(2)]),
    ]
    for ours, xla, exact in zip((*rows[1:], groups), plain, (*expected[3:], expected_groups), strict=True):
        assert ours.dtype == dtype
        error, theirs = (np.abs(np.asarray(y, np.float64) - exact).max() for y in (ours, xla))
        assert error <= 1.5 * theirs, (error, theirs)


@pytest.mark.quick
def test_kernels_state_their_costs():
    """Floating-point operations of all rows; bytes, at least those of the operands."""
    P, K, E, D, F = 4096, 8, 32, 7168, 2048
    N = P * K
    shapes = ((P, D), (P, K), (P, K), (E, D, 2, F), (E, F, D))
    dtypes = (jnp.bfloat16, jnp.float32, jnp.int32, jnp.bfloat16, jnp.bfloat16)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def loss(*args):
        return jnp.sum(tpu_experts(*args, interpret=True).astype(jnp.float32))

    found = calls(jax.grad(loss, argnums=(0, 1, 3, 4)), *args)
    costs = [call["cost_estimate"] for call in found]
    once = 2 * N * D * F
    assert sorted(cost.flops for cost in costs) == sorted([2 * once, once, once, 2 * once, 2 * once, once])
    steps = 64 + 31
    blocks = [(F // 512,), (D // 1792,), (F // 1024,), (D // 1792,), (D // 1024, 2 * F // 2048), (F // 1024, D // 1792)]
    assert [call["grid"] for call in found] == [(*columns, steps) for columns in blocks], "as `block_columns` says"
    assert all(cost.bytes_accessed >= 2 * E * D * F + 2 * N * F for cost in costs)
    assert all(cost.bytes_accessed <= cost.flops / 100 for cost in costs), "far from reading a matrix for every tile"


@pytest.mark.quick
def test_blocks_fit_or_are_refused():
    assert block_columns(7168, lambda columns: columns * 2**14) == 1792
    assert block_columns(200, lambda columns: 0) == 200 and block_columns(5000, lambda columns: columns * 2**14) == 2048
    assert block_columns(4096, lambda columns: columns * 2**16) == 512
    with pytest.raises(c.ConfigError, match="128 columns with all they sum over take 1,073,741,824 bytes"):
        block_columns(4096, lambda columns: columns * 2**23)
    with pytest.raises(ValueError, match="block=200: must be a multiple of 128"):
        tpu_products(interpret=True, block=200)


@pytest.mark.slow
@pytest.mark.parametrize("combine", [True, False])
def test_devices_work_on_their_own_tokens_and_give_what_one_gives(combine):
    experts = CASES["some absent"]
    x, weights, w_in, w_out = operands(*experts.shape)
    dispatch = functools.partial(grouped_experts, implementation="pallas_tpu", combine=combine)
    expected, expected_gradients = run("dense", experts, combine)
    with jax.set_mesh(make_mesh(c.MeshConfig(fsdp=2, model=2))):
        y, gradients = outputs_and_gradients(dispatch)(x, weights, experts, w_in, w_out)
    assert "fsdp" in y.sharding.spec[0]
    assert_close(jax.device_get((y, gradients)), (expected, tuple(expected_gradients.values())), 3e-6)


@pytest.mark.slow
def test_devices_multiply_all_rows_alike():
    x, w, _, _ = drawn(40, 3, 16, 24)
    sizes = jnp.array([11, 0, 20])

    def loss(x, w):
        y = pick_matmul("pallas_tpu")(x, w, sizes)[:31]
        return jnp.sum(jnp.sin(y)), y

    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    alone = jax.jit(step)(x, w)
    with jax.set_mesh(make_mesh(c.MeshConfig(fsdp=2, model=2))):
        together = jax.jit(step)(x, w)
    ((dx, dw), y), ((dx_1, dw_1), y_1) = jax.device_get(together), jax.device_get(alone)
    assert_close((dx[:31], dw, y), (dx_1[:31], dw_1, y_1), 1e-6)


@pytest.mark.quick
def test_float16_is_refused_by_name_and_passed_over_by_default(monkeypatch):
    x, weights, w_in, w_out = operands(1, dtype=jnp.float16)
    message = "implementation='pallas_tpu': TPUs have no float16; use bfloat16"
    with pytest.raises(c.ConfigError, match=message):
        grouped_experts(x, weights, CASES["one token"], w_in, w_out, "pallas_tpu")
    with pytest.raises(c.ConfigError, match=message):
        pick_matmul("pallas_tpu", jnp.float16)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert api.default_implementation(jnp.bfloat16) == "pallas_tpu"
    with jax.set_mesh(make_mesh(c.MeshConfig(expert=2))):
        assert api.default_implementation(jnp.bfloat16) == "ragged_dot", "which does not gather the experts"
    assert api.default_implementation(jnp.float16) == "ragged_dot"


@pytest.mark.quick
def test_kernels_are_interpreted_only_where_there_is_no_tpu(monkeypatch):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 16), (2, 16, 8))]

    def interpreted(interpret=None) -> list[bool]:
        found = calls(lambda x, w: tpu_matmul(x, w, jnp.array([100, 156]), interpret), *shapes)
        return [bool(call["interpret"]) for call in found]

    assert interpreted() == [True] and interpreted(False) == [False]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert interpreted() == [False] and interpreted(True) == [True]
