"""Fast dispatch against a loop over tokens and against every expert on every token, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_experts
from dsv3_jax.ops.dispatch import dense_dispatch, swiglu
from tests.conftest import assert_close

P, K, E, D, F = 300, 2, 4, 5, 6


def experts(case: str) -> jax.Array:
    """Which experts the tokens choose."""
    random = jnp.argsort(jax.random.uniform(jax.random.key(7), (P, E)), axis=1)[:, :K]
    return {
        "random": random,
        "all on one pair": jnp.tile(jnp.array([[1, 3]]), (P, 1)),
        "one empty": jnp.tile(jnp.array([[0, 2], [1, 0], [2, 1]]), (P // 3, 1)),
        "one token": random[:1],
    }[case].astype(jnp.int32)


def operands(num_tokens: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (num_tokens, D), dtype)
    weights = jax.random.uniform(keys[1], (num_tokens, K))
    return x, weights, jax.random.normal(keys[2], (E, D, 2, F), dtype), jax.random.normal(keys[3], (E, F, D), dtype)


def value_and_gradients(dispatch, chosen):
    x, weights, w_in, w_out = operands(len(chosen))

    def loss(x, weights, w_in, w_out):
        out = dispatch(x, weights, chosen, w_in, w_out)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, weights, w_in, w_out)


def test_the_oracle_is_the_loop_over_tokens():
    chosen = experts("random")
    x, weights, w_in, w_out = (np.asarray(a, np.float64) for a in operands(P))
    expected = np.zeros((P, D))
    for p in range(P):
        for k in range(K):
            e = chosen[p, k]
            gate, up = x[p] @ w_in[e, :, 0], x[p] @ w_in[e, :, 1]
            expected[p] += weights[p, k] * ((gate / (1 + np.exp(-gate)) * up) @ w_out[e])
    assert_close(dense_dispatch(*operands(P)[:2], chosen, *operands(P)[2:]), expected, 1e-5)


@pytest.mark.parametrize("case", ["random", "all on one pair", "one empty", "one token"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_and_gradients_are_the_oracles(name, case):
    chosen = experts(case)
    actual = value_and_gradients(lambda *args: grouped_experts(*args, implementation=name), chosen)
    assert_close(actual, value_and_gradients(dense_dispatch, chosen), 1e-5, f"{name}, {case}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_empty_expert_has_zero_gradient(name):
    chosen = experts("one empty")
    gradients, _ = value_and_gradients(lambda *args: grouped_experts(*args, implementation=name), chosen)
    for gradient in gradients[2:]:
        np.testing.assert_array_equal(gradient[3], 0)
        assert float(jnp.abs(gradient[0]).max()) > 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bf16_stays_bf16_and_close(name):
    chosen = experts("random")
    x, weights, w_in, w_out = operands(P, jnp.bfloat16)
    out = grouped_experts(x, weights, chosen, w_in, w_out, implementation=name)
    x, w_in, w_out = (a.astype(jnp.float32) for a in (x, w_in, w_out))
    exact = dense_dispatch(x, weights, chosen, w_in, w_out)
    assert out.dtype == jnp.bfloat16
    assert_close(out, exact, 0.03)  # three roundings to 8 bits, and sums of them


def test_swiglu_gradient():
    x = jax.random.normal(jax.random.key(1), (3, 2, 5))
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(jax.nn.silu(x[..., 0, :]) * x[..., 1, :])))(x)
    assert_close(jax.grad(lambda x: jnp.sum(jnp.sin(swiglu(x))))(x), plain, 1e-6)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ConfigError, match="must be one of bucketed, ragged_dot, reference"):
        grouped_experts(*operands(1)[:2], experts("one token"), *operands(1)[2:], implementation="megablox")
