"""Experts in 8 bits: rounding, and every implementation against the oracle with the matrices dequantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul import IMPLEMENTATIONS, dequantize, grouped_experts, quantize
from dsv3_jax.ops.dispatch import dense_dispatch
from tests.conftest import assert_close
from tests.kernels.pallas_calls import calls
from tests.ops.dispatch_cases import CASES, INTERPRETED, SLOWEST, D, operands


@pytest.mark.quick
@pytest.mark.parametrize(("dtype", "relative"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_rounding_is_within_half_a_step(dtype, relative):
    """int8: half a step of 1/127 of a channel's largest. float8_e4m3fn has 3 bits of mantissa: 2⁻⁴ of a value."""
    _, _, w_in, w_out = operands(1)
    for w in (w_in.at[1, :, 0, 2].set(0.0), w_out):
        q = quantize(w, dtype)
        back = dequantize(q, jnp.float32)
        assert q.values.dtype == dtype and q.values.shape == w.shape and q.scale.shape == (w.shape[0], 1, *w.shape[2:])
        largest = jnp.max(jnp.abs(w), axis=1, keepdims=True)
        assert np.all(np.abs(back - w) <= relative * 1.0001 * largest)
        np.testing.assert_allclose(jnp.max(jnp.abs(back), axis=1, keepdims=True), largest, rtol=1e-6)
    np.testing.assert_array_equal(dequantize(w_in, jnp.bfloat16), w_in)


@pytest.mark.quick
def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="dtype=int16: experts are quantized to int8 or float8_e4m3fn"):
        quantize(jnp.ones((1, 2, 3)), jnp.int16)


def outputs_and_gradients(dispatch):
    """Jitted: x, weights, experts, w_in, w_out -> output, and gradients of x and weights."""

    def loss(x, weights, *rest):
        y = dispatch(x, weights, *rest)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


CHOICES = [
    pytest.param(
        name, dtype, marks=pytest.mark.slow if name == SLOWEST or (name in INTERPRETED and dtype != "int8") else ()
    )
    for name in IMPLEMENTATIONS
    for dtype in ("int8", "float8_e4m3fn")
]


@pytest.mark.parametrize(("name", "dtype"), CHOICES)
def test_outputs_and_gradients_are_the_dequantized_oracles(name, dtype):
    experts = CASES["some absent"]
    x, weights, w_in, w_out = operands(*experts.shape)
    quantized = [quantize(w, dtype) for w in (w_in, w_out)]
    dispatch = functools.partial(grouped_experts, implementation=name)
    actual = outputs_and_gradients(dispatch)(x, weights, experts, *quantized)
    expected = outputs_and_gradients(dense_dispatch)(
        x, weights, experts, *(dequantize(q, jnp.float32) for q in quantized)
    )
    assert_close(actual, expected, 3e-6, name)  # as in tests/ops/test_dispatch.py


@pytest.mark.parametrize("name", ["bucketed", pytest.param("pallas_tpu", marks=pytest.mark.slow)])
def test_scales_get_no_gradient(name):
    experts = CASES["one token"]
    x, weights, w_in, w_out = operands(*experts.shape)
    w_in, w_out = quantize(w_in, "int8"), quantize(w_out, "int8")

    def loss(scale):
        return jnp.sum(grouped_experts(x, weights, experts, w_in._replace(scale=scale), w_out, name))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w_in.scale), 0)


@pytest.mark.quick
def test_kernels_read_eight_bits():
    x, weights, w_in, w_out = operands(4)
    q_in, q_out = quantize(w_in, "int8"), quantize(w_out, "int8")
    experts = CASES["random"][:4]
    found = calls(lambda *args: grouped_experts(*args, "pallas_tpu"), x, weights, experts, q_in, q_out)
    whole = calls(lambda *args: grouped_experts(*args, "pallas_tpu"), x, weights, experts, w_in, w_out)
    assert len(found) == 2
    for eight, thirty_two in zip(found, whole, strict=True):
        saved = thirty_two["cost_estimate"].bytes_accessed - eight["cost_estimate"].bytes_accessed
        assert saved >= 3 * D * 5, "three of the four bytes of a matrix are not read"
