"""Grouped matmuls against the oracle, and the choice of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul import pick_matmul
from dsv3_jax.kernels.grouped_matmul.api import MATMULS
from dsv3_jax.kernels.grouped_matmul.padded import padded_matmul
from dsv3_jax.kernels.grouped_matmul.pallas_tpu import tpu_matmul
from dsv3_jax.kernels.grouped_matmul.reference import reference_matmul
from tests.conftest import assert_close

N, D, F, E = 23, 5, 7, 4
SIZES = {
    "even": (6, 6, 6, 5),
    "as many blocks as there can be": (1, 7, 1, 14),
    "one group": (0, 0, 23, 0),
    "rows past the last group": (0, 3, 0, 9),
    "no groups": (0, 0, 0, 0),
    "the last alone": (0, 0, 0, 2),
}


@functools.partial(jax.jit, static_argnums=0)
def run(matmul, x_ND, w_EDF, sizes_E, cotangent_NF):
    """Products of the rows in groups, and gradients through them."""
    inside_N1 = (jnp.arange(len(x_ND)) < jnp.sum(sizes_E))[:, None]

    def product(x_ND, w_EDF):
        y_NF = jnp.where(inside_N1, matmul(jnp.where(inside_N1, x_ND, 0), w_EDF, sizes_E), 0)
        return jnp.sum(y_NF * cotangent_NF), y_NF

    return jax.grad(product, argnums=(0, 1), has_aux=True)(x_ND, w_EDF)


def operands(rows: int, experts: int):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, D), (experts, D, F), (rows, F))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    "matmul", [padded_matmul, tpu_matmul, jax.lax.ragged_dot], ids=["padded", "pallas_tpu", "ragged_dot"]
)
@pytest.mark.parametrize("case", SIZES)
def test_outputs_and_gradients_are_the_oracle_s(case, matmul):
    x, w, cotangent = operands(N, E)
    sizes = jnp.array(SIZES[case], jnp.int32)
    expected = run(reference_matmul, x, w, sizes, cotangent)
    assert_close(run(matmul, x, w, sizes, cotangent), expected, 1e-5)  # float32 sums in another order
    (_, dw), _ = run(matmul, x, w, sizes, cotangent)
    np.testing.assert_array_equal(np.asarray(dw)[np.asarray(sizes) == 0], 0)


@pytest.mark.parametrize(
    "matmul", [padded_matmul, pytest.param(tpu_matmul, marks=pytest.mark.slow)], ids=["padded", "pallas_tpu"]
)
def test_fewer_rows_than_groups(matmul):
    x, w, cotangent = operands(2, 6)
    sizes = jnp.array([0, 1, 0, 0, 0, 1], jnp.int32)
    assert_close(run(matmul, x, w, sizes, cotangent), run(reference_matmul, x, w, sizes, cotangent), 1e-5)


@pytest.mark.quick
def test_names_pick_and_an_unknown_one_is_refused():
    assert pick_matmul("bucketed") is padded_matmul and pick_matmul() is padded_matmul
    assert pick_matmul("ragged_dot") is MATMULS["ragged_dot"]
    with pytest.raises(ConfigError, match="must be one of bucketed, pallas_gpu, pallas_tpu, ragged_dot, reference"):
        pick_matmul("megablox")
