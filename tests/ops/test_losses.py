"""Chunked cross-entropy against all logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.losses import cross_entropy, reference_cross_entropy
from tests.conftest import assert_close

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_loss_and_gradients_are_the_oracles(chunk):
    keys = jax.random.split(jax.random.key(chunk), 4)
    hidden, head = jax.random.normal(keys[0], (3, 10, 8)), 3 * jax.random.normal(keys[1], (8, 23))
    targets = jax.random.randint(keys[2], (3, 10), 0, 23)
    weights = (jax.random.uniform(keys[3], (3, 10)) > 0.3) * 1.5

    def value(loss):
        return jax.value_and_grad(lambda h, w: 2 * loss(h, w, targets, weights), argnums=(0, 1))(hidden, head)

    # float32 sums in another order
    assert_close(value(lambda *a: cross_entropy(*a, chunk)), value(reference_cross_entropy), 1e-5)
    assert_close(
        cross_entropy(hidden, head, targets, weights, chunk),
        reference_cross_entropy(hidden, head, targets, weights),
        1e-5,
    )


def test_tokens_of_weight_zero_have_no_gradient_and_huge_logits_stay_finite():
    hidden, head = 1e4 * jnp.ones((1, 2, 4)), jnp.eye(4, 5)
    weights = jnp.array([[1.0, 0.0]])
    loss, dhidden = jax.value_and_grad(cross_entropy)(hidden, head, jnp.array([[4, 4]]), weights)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(dhidden[0, 1], 0)
    assert float(jnp.abs(dhidden[0, 0]).max()) > 0
