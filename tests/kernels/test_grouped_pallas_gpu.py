"""The GPU kernels of grouped matmul, interpreted; compilation for a GPU is in `test_gpu_compilation.py`."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.grouped_matmul import api, dequantize, grouped_experts, pick_matmul, quantize
from dsv3_jax.kernels.grouped_matmul.pallas_gpu import gpu_products
from tests.conftest import assert_close
from tests.kernels.test_grouped_pallas_tpu import by_hand, drawn
from tests.ops.dispatch_cases import CASES, operands

N, SIZES = 213, np.array([70, 0, 100, 1, 19])  # tiles of 128 rows that groups share, an empty group, rows past the last


def poisoned():
    """Operands whose rows past the groups are NaN, and what comes of them. D = 100 and 213 rows fill no tile."""
    x, w, dy, factor = drawn(N, 5, 100, 256)
    expected = by_hand(x, w, dy, SIZES, factor)
    inside = np.arange(N) < SIZES.sum()
    x, dy, factor = (jnp.where(inside.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.nan) for a in (x, dy, factor))
    return (x, w, dy, factor, jnp.asarray(SIZES)), expected, inside


def test_rows_and_groups_are_those_by_hand_whatever_lies_past_them():
    (x, w, dy, factor, sizes), (expected, expected_groups), inside = poisoned()
    of = gpu_products(interpret=True)
    rows, groups = jax.jit(lambda: (of.rows(x, w, sizes, factor_N=factor), of.groups(x, dy, sizes)))()
    assert_close((rows[inside], groups), (expected[3], expected_groups), 3e-6)
    np.testing.assert_array_equal(groups[1], 0)


def test_what_is_not_finite_stays_in_its_group():
    """Groups of 8 and 56 rows share all that a warpgroup reads at a time."""
    x, _, dy, _ = drawn(64, 2, 100, 256)
    x, dy = x.at[0].set(jnp.inf), dy.at[3].set(jnp.nan)
    groups = jax.jit(gpu_products(interpret=True).groups)(x, dy, jnp.array([8, 56]))
    assert not np.any(np.isfinite(groups[0])) and np.all(np.isfinite(groups[1]))


@pytest.mark.slow
def test_swiglu_and_the_transposed_product_are_those_by_hand():
    (x, w, dy, _, sizes), (expected, _), inside = poisoned()
    of = gpu_products(interpret=True)
    swiglu, back = jax.jit(
        lambda: (of.swiglu(x, w, sizes, save=True), of.rows(dy, w, sizes, transposed=True)),
    )()
    assert_close([y[inside] for y in (*swiglu, back)], expected[:3] + expected[4:], 3e-6)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_matrices_of_eight_bits_are_widened_tile_by_tile(dtype):
    """Seven steps of the ring: each of its slots, and each of the widened tiles, is written anew while others are
    read. A tile of rows is shared by two groups; no channel has the scale of another."""
    x, w, dy, factor = drawn(100, 3, 400, 256)
    q, sizes = quantize(w * jnp.exp(jnp.arange(256) / 64), dtype), np.array([60, 0, 30])
    expected, _ = by_hand(x, dequantize(q, jnp.float32), dy, sizes, factor)
    of = gpu_products(interpret=True)
    rows, swiglu = jax.jit(
        lambda: (of.rows(x, q, jnp.asarray(sizes), factor_N=factor), of.swiglu(x, q, jnp.asarray(sizes), save=True))
    )()
    assert_close([y[:90] for y in (rows, *swiglu)], [expected[3], *expected[:3]], 3e-6)


@pytest.mark.quick
def test_what_the_kernels_cannot_run_is_refused_by_name(monkeypatch):
    x, weights, w_in, w_out = operands(1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    message = "implementation='pallas_gpu': tensor cores multiply bfloat16 and float16, not float32"
    with pytest.raises(c.ConfigError, match=message):
        grouped_experts(x, weights, CASES["one token"], w_in, w_out, "pallas_gpu")
    with pytest.raises(c.ConfigError, match=message):
        pick_matmul("pallas_gpu", jnp.float32)
    assert api.default_implementation(jnp.float32) == "ragged_dot"
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert api.default_implementation(jnp.bfloat16) == "pallas_gpu"
