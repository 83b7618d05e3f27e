"""The routed experts' implementations: which one is picked, and how buckets are filled. Results: tests/ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul import api, bucketed, grouped_experts
from dsv3_jax.kernels.grouped_matmul.padded import padded_matmul
from tests.ops.dispatch_cases import CASES, E, operands


def present(experts) -> np.ndarray:
    experts = np.asarray(experts).reshape(-1)
    return np.bincount(experts[experts < E], minlength=E)


@pytest.mark.parametrize("case", CASES)
def test_every_present_assignment_has_one_place_and_an_absent_one_none(case):
    experts = CASES[case]
    capacity = bucketed._capacity(*experts.shape, E)
    layout = bucketed._layout(experts, E, capacity)
    in_buckets = np.asarray(layout.assignment_Ec)[np.asarray(layout.used_Ec)].tolist()
    np.testing.assert_array_equal(np.sum(layout.used_Ec, axis=1), np.minimum(present(experts), capacity))
    assert sorted(in_buckets) == np.flatnonzero(np.asarray(layout.fits_PK)).tolist()

    overflow = []
    for index in range(int(layout.blocks_E[-1])):
        expert, assignments, own = bucketed._overflow_block(layout, jnp.asarray(index))
        assert set(np.asarray(experts).reshape(-1)[np.asarray(assignments)[np.asarray(own)]]) == {int(expert)}
        overflow += np.asarray(assignments)[np.asarray(own)].tolist()
    assert sorted(in_buckets + overflow) == np.flatnonzero(np.asarray(experts).reshape(-1) < E).tolist()

    block = min(experts.size, bucketed.BLOCK)
    assert int(layout.blocks_E[-1]) == np.sum(-(-np.maximum(present(experts) - capacity, 0) // block))


def test_the_cases_reach_the_loop():
    blocks = {
        case: int(bucketed._layout(experts, E, bucketed._capacity(*experts.shape, E)).blocks_E[-1])
        for case, experts in CASES.items()
    }
    assert blocks["all on one pair"] > 2 and blocks["an overflowing expert and absent ones"] > 1
    assert blocks["all absent"] == blocks["one token"] == 0


def test_buckets_hold_every_token_of_a_few():
    assert bucketed._capacity(8, 2, 64) == 8
    assert bucketed._capacity(2048, 4, 16) == round(1.1 * 512)
    assert bucketed._capacity(300, 5, 5) == 300, "an expert is chosen at most once a token"


@pytest.mark.parametrize(("platform", "picked"), [("cpu", "bucketed"), ("gpu", "ragged_dot"), ("tpu", "pallas_tpu")])
def test_the_default_follows_the_platform(platform, picked, monkeypatch):
    monkeypatch.setattr(api.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {picked: lambda *args, combine: (picked, combine)})
    x, weights, w_in, w_out = operands(1)
    assert grouped_experts(x, weights, CASES["one token"], w_in, w_out, combine=False) == (picked, False)


def test_an_unknown_implementation_is_named():
    x, weights, w_in, w_out = operands(1)
    with pytest.raises(ConfigError, match="must be one of bucketed, pallas_gpu, pallas_tpu, ragged_dot, reference"):
        grouped_experts(x, weights, CASES["one token"], w_in, w_out, implementation="megablox")


@pytest.mark.parametrize("name", ["bucketed", "padded"])
def test_bf16_gradients_of_a_full_expert_lose_no_block(name):
    # 4096 equal addends: a running sum in bfloat16 stalls at 256 of them; rounding the result costs 2^-9.
    P, E, D, F = 4096, 16, 2, 2
    x_PD, w_in, w_out = jnp.ones((P, D)), 0.5 * jnp.ones((E, D, 2, F)), 0.5 * jnp.ones((E, F, D))
    experts_PK, weights_PK = jnp.zeros((P, 1), jnp.int32), jnp.ones((P, 1))

    def loss(weights, dtype):
        operands = [x.astype(dtype) for x in (x_PD, *weights)]
        if name == "bucketed":
            return jnp.sum(grouped_experts(operands[0], weights_PK, experts_PK, *operands[1:], name), dtype=jnp.float32)
        sizes_E = jnp.zeros(E, jnp.int32).at[0].set(P)
        return jnp.sum(padded_matmul(operands[0], operands[1].reshape(E, D, -1), sizes_E), dtype=jnp.float32)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    exact, rounded = gradient((w_in, w_out), jnp.float32), gradient((w_in, w_out), jnp.bfloat16)
    for e, r in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_allclose(np.asarray(r, np.float32), np.asarray(e), rtol=2e-2, atol=1e-6)
