"""Accepted drafts and what replaces the others are distributed as the model's own samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax.inference import acceptance as rules
from dsv3_jax.inference.acceptance import accept_greedy, accept_sampled, acceptance, replacement
from dsv3_jax.inference.sampling import row_keys

SIGNIFICANCE = 1e-3  # seeds are fixed: a right rule passes once and for all; wrong ones are shown to be far below


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of Pearson's chi-square; cells of fewer than 5 expected are one. 0 if what cannot be was counted."""
    counts, expected = np.ravel(counts), np.ravel(probabilities) * np.sum(counts)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue)


def distributions(seed: int, *shape: int) -> jax.Array:
    """Random probabilities, some of them 0, as after top-k."""
    random = np.random.default_rng(seed)
    weight = random.gamma(0.5, size=shape) * (random.random(shape) < 0.7) + 1e-3 * np.eye(shape[-1])[0]
    return jnp.asarray(weight / weight.sum(-1, keepdims=True), jnp.float32)


@pytest.mark.quick
def test_a_draft_or_its_replacement_is_distributed_as_the_model_says():
    p_BV, q_BV = distributions(0, 200, 9), distributions(1, 200, 9)
    accepted_BV = q_BV * jnp.where(q_BV > 0, acceptance(p_BV, q_BV), 0)
    rejected_B1 = 1 - accepted_BV.sum(-1, keepdims=True)
    np.testing.assert_allclose(accepted_BV + rejected_B1 * replacement(p_BV, q_BV), p_BV, atol=2e-6)
    assert (rejected_B1 > 0.01).mean() > 0.9
    np.testing.assert_allclose(replacement(p_BV, p_BV), p_BV)  # rounding left nothing: p, and no NaN


def checked_tokens(rows: int, N: int = 2, V: int = 5) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each token came at each place, and the model's probabilities; drafts drawn with the keys that
    generation draws them with."""
    random = np.random.default_rng(2)
    p_MV, q_NV = random.dirichlet(np.ones(V), N + 1), random.dirichlet(np.ones(V), N)
    keys_BM = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(row_keys(0, rows), jnp.arange(N + 1))
    draft_keys_BN = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, rules.DRAFT)))(keys_BM[:, :N])
    drafts_BN = jax.vmap(jax.vmap(jax.random.categorical), (0, None))(draft_keys_BN, jnp.log(q_NV))
    p_BMV, q_BNV = jnp.broadcast_to(p_MV, (rows, N + 1, V)), jnp.broadcast_to(q_NV, (rows, N, V))
    check: Any = jax.jit(lambda *given: accept_sampled(*given))  # compiled anew, as the rule may be another
    accepted_B, next_B = map(np.asarray, check(p_BMV, q_BNV, drafts_BN, jnp.full(rows, N), keys_BM))
    counts = []
    for place in range(N + 1):
        drafted_B = np.asarray(drafts_BN)[:, place] if place < N else next_B
        token_B = np.where(accepted_B > place, drafted_B, next_B)
        counts.append(np.bincount(token_B[accepted_B >= place], minlength=V))
    return counts, p_MV


@pytest.mark.quick
def test_tokens_at_every_place_come_as_often_as_the_model_says():
    counts, p_MV = checked_tokens(40_000)
    assert all(count.sum() > 1000 for count in counts)
    assert min(map(p_value, counts, p_MV)) > SIGNIFICANCE


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("acceptance", lambda p, q: jnp.where(p > 0, 1.0, 0.0)),
        ("acceptance", lambda p, q: p),
        ("replacement", lambda p, q: p),
        ("ACCEPT", rules.DRAFT),
        ("REPLACE", rules.DRAFT),
        ("REPLACE", rules.ACCEPT),
    ],
)
def test_a_wrong_rule_would_be_seen(monkeypatch, name, wrong):
    monkeypatch.setattr(rules, name, wrong)
    assert min(map(p_value, *checked_tokens(40_000))) < 1e-8


@pytest.mark.quick
def test_drafts_that_were_not_proposed_do_not_count():
    p_MV, rows = distributions(2, 3, 5), 20_000
    p_BMV, q_BNV = jnp.broadcast_to(p_MV, (rows, 3, 5)), jnp.broadcast_to(p_MV[:2], (rows, 2, 5))
    drafts_BN = jnp.broadcast_to(jnp.argmax(p_MV[:2], -1), (rows, 2))
    keys_BM = jnp.stack([row_keys(seed, rows) for seed in range(3)], axis=1)
    check: Any = jax.jit(accept_sampled)
    for proposed in range(3):  # p = q: all that is proposed is accepted, and what follows is drawn from p
        given = check(p_BMV, q_BNV, drafts_BN, jnp.full(rows, proposed), keys_BM)
        assert (np.asarray(given[0]) == proposed).all()
        assert p_value(np.bincount(given[1], minlength=5), p_MV[proposed]) > SIGNIFICANCE


@pytest.mark.quick
def test_greedy_accepts_what_the_model_would_choose():
    logits_BMV = jax.nn.one_hot(jnp.asarray([[1, 2, 3]] * 5), 4)
    drafts_BN = jnp.asarray([[1, 2], [1, 0], [0, 2], [1, 2], [1, 2]])
    accepted_B, next_B = accept_greedy(logits_BMV, drafts_BN, jnp.asarray([2, 2, 2, 1, 0]))
    assert accepted_B.tolist() == [2, 1, 0, 1, 0] and next_B.tolist() == [3, 2, 1, 2, 1]
