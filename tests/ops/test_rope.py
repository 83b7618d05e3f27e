"""Rotations: lengths stay, and products depend on the distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.rope import apply_rope, rope_table

pytestmark = pytest.mark.quick


def test_pair_is_rotated_by_position_times_frequency():
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    out = np.asarray(apply_rope(x, rope_table(jnp.array([[3]]), 4, 100.0)))[0, 0, 0]
    for pair, frequency in ((0, 1.0), (1, 0.1)):
        z = complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 2]) * np.exp(3j * frequency)
        np.testing.assert_allclose([out[pair], out[pair + 2]], [z.real, z.imag], rtol=1e-5)


def test_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(q_position, k_position):
        rotated = [
            apply_rope(x, rope_table(jnp.array([[p]]), 16, 10_000.0)) for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-3)
