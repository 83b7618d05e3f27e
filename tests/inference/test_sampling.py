"""Sampling: against a slow oracle, by frequencies, and independent of the rest of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import GREEDY, Sampling, allowed_logits, make_sampling, row_keys, sample

pytestmark = pytest.mark.quick
V = 12


def oracle(logits_V, temperature, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """Probabilities in float64, one filter after the other, token by token."""
    logits = np.asarray(logits_V, np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    if top_k is not None:
        kth = np.sort(p)[::-1][min(top_k, len(p)) - 1]
        p = np.where(p >= kth, p, 0)
        p /= p.sum()
    if top_p is not None:
        kept, total = np.zeros_like(p), 0.0
        for token in np.argsort(-p):
            if total >= top_p:
                break
            kept[token], total = p[token], total + p[token]
        p = kept / kept.sum()
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
        p /= p.sum()
    return p


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_k": 1},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.5, "top_k": 500},
    {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 2.0, "top_p": 1e-6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_probabilities_are_the_oracles(case):
    logits_BV = np.random.default_rng(0).normal(size=(20, V)).astype(np.float32) * 2
    allowed = jax.jit(allowed_logits)(logits_BV, make_sampling(**case))
    actual = jax.nn.softmax(allowed, axis=-1)
    expected = np.stack([oracle(row, **case) for row in logits_BV])
    np.testing.assert_array_equal(np.asarray(actual) > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_tokens_come_as_often_as_their_probabilities_say():
    logits_V, case = np.random.default_rng(1).normal(size=V) * 2, {"temperature": 1.3, "top_k": 8, "top_p": 0.95}
    rows = 20_000
    draw = jax.jit(lambda logits, keys: sample(logits, keys, 3, make_sampling(**case)))
    tokens = draw(jnp.broadcast_to(jnp.asarray(logits_V), (rows, V)), row_keys(0, rows))
    p = oracle(logits_V, **case)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    # Four standard deviations of a binomial count.
    assert (np.abs(counts - rows * p) <= 4 * np.sqrt(rows * p * (1 - p)) + 1e-9).all()


def test_greedy_takes_the_best_and_the_first_of_equals():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    assert sample(logits, row_keys(0, 2), 0, GREEDY).tolist() == [1, 0]


def test_a_row_draws_the_same_in_any_batch_and_anew_at_each_step():
    logits_BV = jax.random.normal(jax.random.key(0), (6, 400))
    settings = make_sampling(temperature=1.0, top_p=0.9)
    steps = [np.asarray(sample(logits_BV, row_keys(7, 6), step, settings)) for step in range(3)]
    np.testing.assert_array_equal(sample(logits_BV[:2], row_keys(7, 2), 1, settings), steps[1][:2])
    changed = logits_BV.at[3:].set(0.0)
    np.testing.assert_array_equal(sample(changed, row_keys(7, 6), 1, settings)[:3], steps[1][:3])
    assert (steps[0] != steps[1]).any() and (steps[1] != steps[2]).any()
    assert (np.asarray(sample(logits_BV, row_keys(8, 6), 1, settings)) != steps[1]).any()
    same_logits = jnp.broadcast_to(logits_BV[:1], (64, 400))
    assert len(set(np.asarray(sample(same_logits, row_keys(7, 64), 0, settings)).tolist())) > 5


def test_settings_may_differ_by_row():
    logits_BV = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (V,)), (2, V))
    settings = Sampling(temperature=jnp.asarray([1.0, 2.0]), top_k=jnp.asarray([2, 5]), top_p=jnp.asarray([1.0, 0.8]))
    actual = jax.nn.softmax(allowed_logits(logits_BV, settings), axis=-1)
    expected = [oracle(logits_BV[0], 1.0, 2), oracle(logits_BV[1], 2.0, 5, 0.8)]
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)


def test_another_value_does_not_compile_anew():
    compiled = jax.jit(lambda logits, keys, settings: sample(logits, keys, 0, settings))
    for temperature, top_k in ((1.0, 2), (0.5, 3), (2.0, 9)):
        compiled(jnp.ones((2, V)), row_keys(0, 2), make_sampling(temperature, top_k))
    assert compiled._cache_size() == 1


def test_extreme_temperatures_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 9e3]])
    for temperature in (1e-40, 1e-6, 1e6):
        p = np.asarray(jax.nn.softmax(allowed_logits(logits, make_sampling(temperature)), axis=-1))
        assert np.isfinite(p).all() and p.argmax() == 0


def test_a_row_of_temperature_zero_or_nearly_is_greedy():
    logits_BV = jnp.asarray([[0.0, 2.0, 3.0, -1.0]] * 3)
    settings = Sampling(temperature=jnp.asarray([0.0, 1e-40, 1.0]), top_p=jnp.asarray([0.9, 1.0, 0.9]))
    tokens = np.asarray([sample(logits_BV, row_keys(0, 3), step, settings) for step in range(20)])
    assert (tokens[:, :2] == 2).all() and set(tokens[:, 2]) == {1, 2}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0: must be at least 0"),
        ({"top_k": 0}, "--top_k=0"),
        ({"top_p": 0.0}, "--top_p=0.0"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
        ({"min_p": 2.0}, "--min_p=2.0"),
    ],
)
def test_values_out_of_range_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        make_sampling(**given)


def test_temperature_zero_is_greedy():
    assert make_sampling(0.0, top_k=3) == GREEDY
