"""The published router against a loop, and the invariants that other ports broke."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ops.routing import route, update_selection_bias

pytestmark = pytest.mark.quick
ROUTER = c.GroupedSigmoid(top_k=3, num_groups=4, top_groups=2, route_scale=2.5)
B, T, E = 2, 7, 12


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    logits = jax.random.normal(keys[0], (B, T, E))
    mask = jnp.arange(T) < jnp.array([[7], [5]])
    return logits, 0.3 * jax.random.normal(keys[1], (E,)), mask


def route_by_loop(router, logits, bias):
    """One token at a time, as the papers write it."""
    logits = np.asarray(logits, np.float64)
    sigmoid = isinstance(router, c.GroupedSigmoid)
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts, weights = [], []
    for token in scores.reshape(-1, E):
        biased = token + np.asarray(bias, np.float64)
        groups = biased.reshape(router.num_groups, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2 if sigmoid else -1 :].sum(axis=1))[: router.top_groups]
        allowed = [e for e in range(E) if e // groups.shape[1] in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: router.top_k]
        experts.append(chosen)
        total = token[chosen].sum() if router.normalize_weights else 1
        weights.append(token[chosen] / total * router.route_scale)
    return np.array(experts).reshape(B, T, -1), np.array(weights).reshape(B, T, -1)


ROUTERS = [
    ROUTER,
    c.Softmax(top_k=2),
    c.Softmax(top_k=3, num_groups=4, top_groups=2, normalize_weights=False, route_scale=16.0),
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_router_is_the_loop(seed, router):
    logits, bias, mask = inputs(seed)
    bias = bias if isinstance(router, c.GroupedSigmoid) else jnp.zeros(E)
    routing = route(router, logits, bias, mask)
    experts, weights = route_by_loop(router, logits, bias)
    np.testing.assert_array_equal(routing.experts_BTK, experts)
    np.testing.assert_allclose(routing.weights_BTK, weights, rtol=1e-5)


@pytest.mark.parametrize("shift", [-5.0, 3.0])
def test_shifting_every_bias_leaves_choices_unchanged(shift):
    logits, bias, mask = inputs()
    before, after = (route(ROUTER, logits, b, mask) for b in (bias, bias + shift))
    np.testing.assert_array_equal(before.experts_BTK, after.experts_BTK)
    np.testing.assert_array_equal(before.weights_BTK, after.weights_BTK)


def test_permuting_groups_of_experts_permutes_nothing_else():
    logits, bias, mask = inputs()
    order = np.array([6, 7, 8, 0, 1, 2, 9, 10, 11, 3, 4, 5])  # groups 2, 0, 3, 1
    before, after = route(ROUTER, logits, bias, mask), route(ROUTER, logits[..., order], bias[order], mask)
    np.testing.assert_array_equal(before.experts_BTK, order[np.asarray(after.experts_BTK)])
    np.testing.assert_allclose(before.sums["balance"], after.sums["balance"], rtol=1e-6)


def test_load_and_balance_loss_count_real_tokens_only():
    logits, bias, mask = inputs()
    routing = route(ROUTER, logits, bias, mask)
    load, balance = np.zeros(E), 0.0
    scores = np.asarray(routing.scores_BTE, np.float64)
    for b in range(B):
        real = np.asarray(mask[b])
        count = np.bincount(np.asarray(routing.experts_BTK[b])[real].reshape(-1), minlength=E)
        load += count
        share = (scores[b] / scores[b].sum(-1, keepdims=True))[real].mean(axis=0)
        balance += np.sum(E / (ROUTER.top_k * real.sum()) * count * share)
    np.testing.assert_array_equal(routing.load_E, load)
    assert float(routing.load_E.sum()) == float(mask.sum()) * ROUTER.top_k
    assert float(routing.sums["balance"]) == pytest.approx(balance, rel=1e-5)
    other = route(ROUTER, logits.at[1, 5:].set(9.0), bias, mask)
    assert float(other.sums["balance"]) == pytest.approx(float(routing.sums["balance"]), rel=1e-6)


def test_balance_loss_is_one_when_balanced():
    router = c.GroupedSigmoid(top_k=1, num_groups=1, top_groups=1)
    logits = 8.0 * jnp.eye(4)[None]  # four tokens, one on each of four experts
    routing = route(router, logits, jnp.zeros(4), jnp.ones((1, 4), bool))
    assert float(routing.sums["balance"]) == pytest.approx(1.0, rel=1e-5)


def test_gradients_reach_logits_but_not_the_bias():
    logits, bias, mask = inputs()

    def weight_sum(logits, bias):
        return jnp.sum(route(ROUTER, logits, bias, mask).weights_BTK[..., 0])

    dlogits, dbias = jax.grad(weight_sum, argnums=(0, 1))(logits, bias)
    assert float(jnp.abs(dlogits).max()) > 0
    np.testing.assert_array_equal(dbias, 0)


def test_bias_moves_by_the_rate_towards_balance():
    load = jnp.array([[10.0, 2.0, 6.0], [6.0, 6.0, 6.0]])
    moved = update_selection_bias(jnp.zeros((2, 3)), load, 0.01)
    np.testing.assert_allclose(moved, [[-0.01, 0.01, 0], [0, 0, 0]], atol=1e-9)
