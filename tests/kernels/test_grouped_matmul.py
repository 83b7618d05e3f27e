"""The routed experts' implementations: which one is picked, and how buckets are filled. Results: tests/ops."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul import api, bucketed, grouped_experts
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


@pytest.mark.parametrize(("platform", "picked"), [("cpu", "bucketed"), ("gpu", "ragged_dot"), ("tpu", "ragged_dot")])
def test_the_default_follows_the_platform(platform, picked, monkeypatch):
    monkeypatch.setattr(api.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {picked: lambda *args, combine: (picked, combine)})
    x, weights, w_in, w_out = operands(1)
    assert grouped_experts(x, weights, CASES["one token"], w_in, w_out, combine=False) == (picked, False)


def test_an_unknown_implementation_is_named():
    x, weights, w_in, w_out = operands(1)
    with pytest.raises(ConfigError, match="must be one of bucketed, ragged_dot, reference"):
        grouped_experts(x, weights, CASES["one token"], w_in, w_out, implementation="megablox")
