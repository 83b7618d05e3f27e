"""Rotations: lengths stay, and products depend on the distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ops.rope import apply_rope, frequencies, rope_table, rotation_factor, softmax_factor

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


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(frequencies(16, 1e4, c.LinearScaling(4.0)), frequencies(16, 1e4) / 4, rtol=1e-6)


@pytest.mark.parametrize("scaling", [c.Yarn(8.0, 4096), c.Llama3Scaling(8.0, 4096, 1.0, 32.0)], ids=["yarn", "llama3"])
def test_fast_rotations_are_kept_and_slow_ones_interpolated(scaling):
    plain, scaled = frequencies(64, 1e4), frequencies(64, 1e4, scaling)
    ratio, turns = plain / scaled, plain * 4096 / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)  # beta_fast is 32, and the ramp begins at a whole pair
    np.testing.assert_allclose(ratio[turns < 0.5], 8, rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-6) and np.any((ratio > 1.1) & (ratio < 7.9))


def test_yarn_scales_rotations_and_softmax_as_published():
    deepseek, paper = c.Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0), c.Yarn(40.0, 4096, mscale_all_dim=0.0)
    m = 0.1 * np.log(40) + 1
    assert rotation_factor(deepseek) == pytest.approx(1) and softmax_factor(deepseek) == pytest.approx(m * m)
    assert rotation_factor(paper) == pytest.approx(m) and softmax_factor(paper) == pytest.approx(1)
    table = rope_table(jnp.array([[0]]), 8, 1e4, paper)
    np.testing.assert_allclose(table.cos_BTr, m, rtol=1e-6)
    assert rotation_factor(None) == rotation_factor(c.LinearScaling()) == softmax_factor(None) == 1
