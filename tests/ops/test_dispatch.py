"""Dispatch: the oracle against a loop over tokens, every other one against the oracle, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.grouped_matmul.reference import reference_matmul
from dsv3_jax.ops.dispatch import (
    capacity_dispatch,
    capacity_of,
    dense_dispatch,
    grouped_dispatch,
    sort_by_expert,
    swiglu,
    within_capacity,
)
from tests.conftest import assert_close
from tests.ops.dispatch_cases import (
    CASES,
    DISPATCHES,
    FAST,
    D,
    E,
    F,
    K,
    P,
    on_each,
    operands,
    outputs_and_gradients,
    random_experts,
    run,
)

# float32 has 2⁻²⁴ of rounding in a result, and sums of up to 600 terms, in another order, some tens of that.
FLOAT32 = 3e-6
# A bf16 rounding is up to 2⁻⁹ = 0.002 of a value. An output passes three (gate and up, hidden, result), a gradient
# up to six (also those of dy, of what reaches the hidden units, and its own); they partly cancel in the sums.
BF16 = 0.015


@pytest.mark.parametrize("case", ["random", "some absent"])
def test_the_oracle_is_the_loop_over_tokens(case):
    experts = CASES[case]
    x, weights, w_in, w_out = (np.asarray(a, np.float64) for a in operands(P))
    each = np.zeros((P, K, D))
    for p, k in np.argwhere(np.asarray(experts) < E):
        e = experts[p, k]
        gate, up = x[p] @ w_in[e, :, 0], x[p] @ w_in[e, :, 1]
        each[p, k] = (gate / (1 + np.exp(-gate)) * up) @ w_out[e]
    assert_close(run("dense", experts)[0], np.einsum("pkd,pk->pd", each, weights), FLOAT32)
    assert_close(run("dense", experts, combine=False)[0], each, FLOAT32)


def test_uncombined_is_one_expert_at_a_time():
    experts = CASES["some absent"]
    x, weights, w_in, w_out = operands(P)
    y_PKD, _ = run("dense", experts, combine=False)
    for k in range(K):
        alone = dense_dispatch(x, jnp.ones((P, 1)), experts[:, k : k + 1], w_in, w_out)
        assert_close(y_PKD[:, k], alone, FLOAT32)


@pytest.mark.parametrize(("name", "case", "combine"), on_each(FAST, CASES, slowest=True))
def test_outputs_and_gradients_are_the_oracles(name, case, combine):
    actual, expected = run(name, CASES[case], combine), run("dense", CASES[case], combine)
    assert actual[0].shape == ((len(CASES[case]), CASES[case].shape[1], D) if not combine else (len(CASES[case]), D))
    assert_close(actual, expected, FLOAT32, f"{name}, {case}")


@pytest.mark.parametrize(("name", "case", "combine"), on_each(DISPATCHES, ["random", "all on one pair", "some absent"]))
def test_bf16_stays_bf16_and_close_to_float32(name, case, combine):
    rounded = operands(P, dtype=jnp.bfloat16)
    exact = run("dense", CASES[case], combine, [a.astype(jnp.float32) for a in rounded])
    y, gradients = run(name, CASES[case], combine, rounded)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype for g in gradients.values()] == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert_close((y, gradients), exact, BF16, f"{name}, {case}")


@pytest.mark.parametrize(
    ("name", "case", "combine"),
    on_each(DISPATCHES, [case for case in CASES if "absent" in case or "none" in case or "empty" in case]),
)
def test_nothing_comes_of_the_absent_nor_reaches_the_unused(name, case, combine):
    """Exactly: zeros, not small numbers."""
    experts = np.asarray(CASES[case])
    x, weights, w_in, w_out = operands(*experts.shape)
    y, gradients = run(name, CASES[case], combine)
    absent_PK, unused_E = experts == E, np.bincount(experts.reshape(-1), minlength=E)[:E] == 0
    idle_P = absent_PK.all(axis=1)
    np.testing.assert_array_equal(y[idle_P] if combine else y[absent_PK], 0)
    np.testing.assert_array_equal(gradients["x"][idle_P], 0)
    np.testing.assert_array_equal(gradients["weights"][absent_PK], 0)
    for name_of in ("w_in", "w_out"):
        np.testing.assert_array_equal(gradients[name_of][unused_E], 0)
        assert np.all(np.abs(gradients[name_of][~unused_E]).max(axis=(1, 2)) > 0)

    other_weights = jnp.where(absent_PK, 1e3, weights)
    changed = run(name, CASES[case], combine, (x, other_weights, w_in, w_out))
    jax.tree.map(np.testing.assert_array_equal, changed, (y, gradients))


@pytest.mark.parametrize(("name", "case", "combine"), on_each(FAST, combines=[False]))
def test_weights_of_uncombined_outputs_are_not_used(name, case, combine):
    x, _, w_in, w_out = operands(P)
    y, gradients = run(name, CASES[case], combine, (x, jnp.full((P, K), jnp.nan), w_in, w_out))
    assert_close(y, run("dense", CASES[case], combine)[0], FLOAT32)
    np.testing.assert_array_equal(gradients["weights"], 0)


@pytest.mark.parametrize(("name", "case", "combine"), on_each(DISPATCHES, ["some absent"]))
def test_permuting_the_experts_permutes_their_gradients_alone(name, case, combine):
    experts, moved_to = CASES[case], jnp.array([3, 0, 4, 1, 2, E])
    comes_from = jnp.argsort(moved_to[:E])
    x, weights, w_in, w_out = operands(P)
    y, gradients = run(name, experts, combine)
    there, moved = run(name, moved_to[experts], combine, (x, weights, w_in[comes_from], w_out[comes_from]))
    expected = gradients | {key: gradients[key][comes_from] for key in ("w_in", "w_out")}
    assert_close((there, moved), (y, expected), FLOAT32)


@jax.custom_vjp
def careless_matmul(x_ND, w_EDF, group_sizes_E):
    """A grouped matmul that leaves NaN past its groups, as memory that was never written may hold."""
    past_N1 = (jnp.arange(len(x_ND)) >= jnp.sum(group_sizes_E))[:, None]
    return jnp.where(past_N1, jnp.nan, reference_matmul(x_ND, w_EDF, group_sizes_E))


def careless_forward(x_ND, w_EDF, group_sizes_E):
    return careless_matmul(x_ND, w_EDF, group_sizes_E), (x_ND, w_EDF, group_sizes_E)


def careless_backward(saved, dy_NF):
    x_ND, w_EDF, group_sizes_E = saved
    past_N1 = (jnp.arange(len(x_ND)) >= jnp.sum(group_sizes_E))[:, None]
    operands = (jnp.where(past_N1, 0, x_ND), w_EDF)
    vjp = jax.vjp(lambda x, w: reference_matmul(x, w, group_sizes_E), *operands)[1]
    dx_ND, dw_EDF = vjp(jnp.where(past_N1, 0, dy_NF))
    return jnp.where(past_N1, jnp.nan, dx_ND), dw_EDF, None


careless_matmul.defvjp(careless_forward, careless_backward)


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("case", ["some absent", "all absent"])
def test_what_a_grouped_matmul_leaves_past_its_groups_is_not_used(case, combine):
    x, weights, w_in, w_out = operands(P)

    def dispatch(*args):
        return grouped_dispatch(*args, careless_matmul, combine=combine)

    y, gradients = outputs_and_gradients(dispatch)(x, weights, CASES[case], w_in, w_out)
    expected, expected_gradients = run("dense", CASES[case], combine)
    assert_close((y, gradients), (expected, tuple(expected_gradients.values())), FLOAT32)


def test_the_absent_lie_after_all_groups():
    sizes = []

    def matmul(x_ND, w_EDF, group_sizes_E):
        sizes.append(np.asarray(group_sizes_E))
        return reference_matmul(x_ND, w_EDF, group_sizes_E)

    x, weights, w_in, w_out = operands(P)
    grouped_dispatch(x, weights, CASES["some absent"], w_in, w_out, matmul)
    expected = np.bincount(np.asarray(CASES["some absent"]).reshape(-1), minlength=E + 1)[:E]
    assert expected.sum() == P * K - P * K // 3
    np.testing.assert_array_equal(sizes, [expected, expected])


def test_sorting_by_expert():
    found = sort_by_expert(jnp.array([2, 3, 0, 2, 3, 0]), 3)
    np.testing.assert_array_equal(found.order_N, [2, 5, 0, 3, 1, 4])
    np.testing.assert_array_equal(found.place_N, [2, 4, 0, 3, 5, 1])
    np.testing.assert_array_equal(found.rank_N[jnp.array([0, 2, 3, 5])], [0, 0, 1, 1])
    np.testing.assert_array_equal(found.start_E, [0, 2, 2])
    np.testing.assert_array_equal(found.sizes_E, [2, 0, 2])


def test_swiglu_gradient():
    x = jax.random.normal(jax.random.key(1), (3, 2, 5))
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(jax.nn.silu(x[..., 0, :]) * x[..., 1, :])))(x)
    assert_close(jax.grad(lambda x: jnp.sum(jnp.sin(swiglu(x))))(x), plain, 1e-6)


# Capacity


@pytest.mark.parametrize(
    ("factor", "T", "K", "E", "expected"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 2048, 4, 16, 640),
        (1.0, 10, 1, 3, 4),  # rounded up
        (1.1, 20, 1, 2, 11),  # 1.1 · 10 is 11.000000000000002
        (0.01, 8, 1, 8, 1),  # at least 1
        (100.0, 8, 2, 4, 8),  # no expert is chosen twice by a token
    ],
)
def test_capacity_of(factor, T, K, E, expected):
    assert capacity_of(factor, T, K, E) == expected


ROW = [[0, 1], [0, 2], [1, 0], [0, 1]]
ALL = [True] * 4


@pytest.mark.parametrize(
    ("row", "mask", "capacity", "expected"),
    [
        (ROW, ALL, 2, [[1, 1], [1, 1], [1, 0], [0, 0]]),
        (ROW, ALL, 1, [[1, 1], [0, 1], [0, 0], [0, 0]]),
        (ROW, ALL, 3, [[1, 1], [1, 1], [1, 1], [0, 1]]),
        (ROW, [False, True, True, True], 2, [[0, 0], [1, 1], [1, 1], [0, 1]]),  # padding takes none
        ([[0, 1], [3, 2], [1, 0], [0, 1]], ALL, 2, [[1, 1], [0, 1], [1, 1], [0, 0]]),  # the absent take none
        ([[0, 0], [0, 0], [1, 1], [2, 1]], ALL, 3, [[1, 1], [1, 0], [1, 1], [1, 1]]),  # by position, then k
    ],
)
def test_within_capacity_by_hand(row, mask, capacity, expected):
    beside = [[0, 1]] * 4  # another row, which takes nothing from the first
    keep = within_capacity(jnp.array([beside, row]), 3, capacity, jnp.array([ALL, mask]))
    assert keep.dtype == bool
    np.testing.assert_array_equal(keep[1], np.array(expected, bool))
    np.testing.assert_array_equal(keep[0], np.arange(4)[:, None].repeat(2, axis=1) < capacity)


B, T, CAPACITY = 3, 20, 6


def routing(seed: int) -> tuple[jax.Array, jax.Array]:
    """Experts [B, T, K], some absent, and a mask with padding in front, between and behind."""
    keys = jax.random.split(jax.random.key(seed), 2)
    experts = random_experts(B * T, K, seed).reshape(B, T, K)
    experts = jnp.where(jax.random.bernoulli(keys[0], 0.1, experts.shape), E, experts)
    return experts, jax.random.bernoulli(keys[1], 0.9, (B, T))


@pytest.mark.parametrize("seed", range(3))
def test_kept_and_dropped_are_those_of_a_loop(seed):
    experts, mask = routing(seed)
    expected, load = np.zeros((B, T, K), bool), np.zeros((B, E), int)
    for b, t, k in np.ndindex(B, T, K):
        e = int(experts[b, t, k])
        if mask[b, t] and e < E:
            expected[b, t, k] = load[b, e] < CAPACITY
            load[b, e] += 1
    keep = within_capacity(experts, E, CAPACITY, mask)
    np.testing.assert_array_equal(keep, expected)
    drops = np.sum((np.asarray(experts) < E) & np.asarray(mask)[..., None]) - np.sum(keep)
    assert drops == np.maximum(load - CAPACITY, 0).sum() > 0


def test_later_tokens_push_out_no_earlier_ones():
    experts, mask = routing(0)
    keep = np.asarray(within_capacity(experts, E, CAPACITY, mask))
    other_experts, other_mask = routing(1)
    for t in range(1, T):
        later = jnp.arange(T) >= t
        changed = within_capacity(
            jnp.where(later[:, None], other_experts, experts), E, CAPACITY, jnp.where(later, other_mask, mask)
        )
        np.testing.assert_array_equal(changed[:, :t], keep[:, :t])
    earlier = jnp.where((jnp.arange(T) < T // 2)[:, None], other_experts, experts)
    reached = np.asarray(within_capacity(earlier, E, CAPACITY, mask))[:, T // 2 :] != keep[:, T // 2 :]
    assert reached.any(), "earlier tokens must be able to push out later ones, or this tests nothing"


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FLOAT32), (jnp.bfloat16, BF16)])
def test_capacity_dispatch_is_the_oracle_on_what_is_kept(dtype, tolerance, combine):
    experts, mask = routing(0)
    x, weights, w_in, w_out = operands(B * T, dtype=dtype)
    keep = within_capacity(experts, E, CAPACITY, mask)
    kept = jnp.where(keep, experts, E)

    def dispatch(x, weights, experts, w_in, w_out):
        by_row = (x.reshape(B, T, D), weights.reshape(B, T, K), experts.reshape(B, T, K))
        y = capacity_dispatch(*by_row, w_in, w_out, CAPACITY, combine=combine)
        return y.reshape(B * T, *y.shape[2:])

    y, gradients = outputs_and_gradients(dispatch)(x, weights, kept.reshape(-1, K), w_in, w_out)
    exact = [a.astype(jnp.float32) for a in (x, weights, w_in, w_out)]
    expected, expected_gradients = run("dense", kept.reshape(-1, K), combine, exact)
    assert_close((y, gradients), (expected, tuple(expected_gradients.values())), tolerance)


def test_capacity_dispatch_itself_drops_what_has_no_slot():
    experts, mask = routing(0)
    x, weights, w_in, w_out = operands(B * T)
    real = jnp.where(mask[..., None], experts, E)
    kept = jnp.where(within_capacity(experts, E, CAPACITY, mask), experts, E)
    assert np.any(real != kept)
    rest = (w_in, w_out, CAPACITY)
    by_row = (x.reshape(B, T, D), weights.reshape(B, T, K))
    np.testing.assert_array_equal(capacity_dispatch(*by_row, real, *rest), capacity_dispatch(*by_row, kept, *rest))


def test_a_large_factor_drops_nothing():
    experts, mask = routing(0)
    capacity = capacity_of(float(E), T, K, E)
    real = (experts < E) & mask[..., None]
    np.testing.assert_array_equal(within_capacity(experts, E, capacity, mask), real)
    x, weights, w_in, w_out = operands(B * T)
    y = capacity_dispatch(x.reshape(B, T, D), weights.reshape(B, T, K), experts, w_in, w_out, capacity)
    dropless, _ = run("bucketed", experts.reshape(-1, K))
    assert_close(y.reshape(B * T, D), dropless, FLOAT32)


def test_products_are_over_buckets_alone():
    """Two over `CAPACITY` places for each row and expert, and the weighted sum."""
    experts, _ = routing(0)
    x, weights, w_in, w_out = operands(B * T)
    args = (x.reshape(B, T, D), weights.reshape(B, T, K), experts, w_in, w_out)
    jaxpr = jax.make_jaxpr(lambda *a: capacity_dispatch(*a, CAPACITY))(*args)
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    sizes = sorted(e.outvars[0].aval.size for e in products)
    assert sizes == sorted([B * T * D, E * B * CAPACITY * D, E * B * CAPACITY * 2 * F])
