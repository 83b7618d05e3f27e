"""The mixture layer: cross-expert attention, widths, condition, mass, noise and dropout, by a loop or by law."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.layers.cross_expert import CrossExpert
from dsv3_jax.layers.inputs import Packing, make_packing
from dsv3_jax.layers.moe import MoE
from dsv3_jax.models.transformer import Transformer, task_conditions
from dsv3_jax.ops.dispatch import capacity_of, dense_dispatch, within_capacity
from dsv3_jax.ops.patterns import Place
from dsv3_jax.ops.routing import Exploration, load_by_context, route, update_mass
from tests.conftest import assert_close, tiny_model

B, T, D, E, F, K = 2, 9, 8, 6, 5, 3
CONFIG = c.ModelConfig(dim=D)
CROSS = c.CrossExpertAttention(num_heads=2, head_dim=4)


def packing(real=T, seed: int | None = None) -> Packing:
    position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    key_B = None if seed is None else jax.random.split(jax.random.key(seed), B)
    place = Place(position_BT, (position_BT < real).astype(jnp.int32))
    return dataclasses.replace(make_packing(CONFIG, place), key_B=key_B)


def mixture(**changes) -> c.MixtureOfExperts:
    moe = c.MixtureOfExperts(E, F, 0, router=c.Softmax(top_k=K), dispatch=c.DenseDispatch())
    return dataclasses.replace(moe, **changes)


def init(module, *args):
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *args))


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


# Cross-expert attention.


def cross_by_loop(params, y_BTKD, used_BTK):
    """One token at a time, with the experts that it uses and no others; zeros for those that it does not."""
    out_BTKD = jnp.zeros_like(y_BTKD)
    for b, t in np.ndindex(*used_BTK.shape[:2]):
        used = np.flatnonzero(used_BTK[b, t])
        y_JD = y_BTKD[b, t, used]
        normed_JD = y_JD / jnp.sqrt(jnp.mean(y_JD**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon)
        q, k, v = jnp.einsum("JD,DxHN->xJHN", normed_JD * params["norm"]["scale"], params["w_qkv"])
        scores_HJI = jnp.einsum("JHN,IHN->HJI", q, k) / math.sqrt(CROSS.head_dim)
        mixed_JD = jnp.einsum("HJI,IHN,HND->JD", jax.nn.softmax(scores_HJI), v, params["w_out"])
        out_BTKD = out_BTKD.at[b, t, used].set(y_JD + mixed_JD)
    return out_BTKD


def test_cross_expert_attention_is_the_loop_and_absent_experts_do_not_matter():
    module, used_BTK = CrossExpert(CONFIG, CROSS), np.array([[[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]], bool)
    y_BTKD = jax.random.normal(jax.random.key(1), (1, 4, K, D))
    cotangent = jax.random.normal(jax.random.key(2), y_BTKD.shape) * used_BTK[..., None]
    params = init(module, y_BTKD, used_BTK)["params"]
    params["norm"]["scale"] += 0.3 * jax.random.normal(jax.random.key(3), (D,))

    def run(function):
        def loss(params, y_BTKD):
            out_BTKD = function(params, y_BTKD)
            return jnp.sum(out_BTKD * cotangent), out_BTKD * used_BTK[..., None]

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    fast = run(lambda params, y_BTKD: module.apply({"params": params}, y_BTKD, used_BTK))
    result = fast(params, y_BTKD)
    expected = run(lambda params, y_BTKD: cross_by_loop(params, y_BTKD, used_BTK))(params, y_BTKD)
    assert_close(result, expected, 1e-5)
    np.testing.assert_array_equal(np.asarray(result[0][1])[~used_BTK], 0)
    _, changed = fast(params, jnp.where(used_BTK[..., None], y_BTKD, 7.0))
    np.testing.assert_array_equal(changed, result[1])
    assert np.all(np.isfinite(module.apply({"params": params}, jnp.zeros_like(y_BTKD), used_BTK)))


def test_an_expert_that_is_full_has_no_part_in_cross_expert_attention():
    x_BTD = tokens()
    module = MoE(CONFIG, mixture(dispatch=c.CapacityDispatch(0.7), combination=CROSS))
    variables = init(module, x_BTD, packing())
    y_BTD, routing, _ = jax.jit(module.apply)(variables, x_BTD, packing())
    mask_BT = jnp.ones((B, T), bool)
    keep_BTK = within_capacity(routing.experts_BTK, E, capacity_of(0.7, T, K, E), mask_BT)
    assert 0 < float(routing.sums["dropped"]) == np.sum(~np.asarray(keep_BTK))

    params = variables["params"]
    experts_PK = jnp.where(keep_BTK, routing.experts_BTK, E).reshape(-1, K)
    flat = (x_BTD.reshape(-1, D), jnp.ones(experts_PK.shape), experts_PK, params["w_in"], params["w_out"])
    y_BTKD = dense_dispatch(*flat, combine=False).reshape(B, T, K, D)
    mixed_BTKD = cross_by_loop(params["cross_expert"], y_BTKD, np.asarray(keep_BTK))
    assert_close(y_BTD, jnp.einsum("BTK,BTKD->BTD", routing.weights_BTK, mixed_BTKD), 1e-5)


# Widths.


@pytest.mark.parametrize("dispatch", [c.DenseDispatch(), c.GroupedDispatch()], ids=str)
def test_a_narrow_expert_is_one_stored_at_its_width(dispatch):
    widths, x_BTD = (2, 5, 3, 1), tokens()
    module = MoE(CONFIG, mixture(expert=c.FeedForward(widths), dispatch=dispatch))
    variables = init(module, x_BTD, packing())

    @jax.jit
    def run(params):
        def loss(params):
            y_BTD, routing, _ = module.apply(variables | {"params": params}, x_BTD, packing())
            return jnp.sum(jnp.square(y_BTD)), (y_BTD, routing)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (y_BTD, routing) = run(variables["params"])
    w_in, w_out = (np.asarray(variables["params"][name], np.float64) for name in ("w_in", "w_out"))
    expected = np.zeros((B, T, D))
    for b, t, k in np.ndindex(B, T, K):
        e = int(routing.experts_BTK[b, t, k])
        width = widths[e % len(widths)]
        gate, up = (np.asarray(x_BTD[b, t], np.float64) @ w_in[e, :, i, :width] for i in (0, 1))
        expected[b, t] += float(routing.weights_BTK[b, t, k]) * (gate / (1 + np.exp(-gate)) * up) @ w_out[e, :width]
    assert_close(y_BTD, expected, 1e-5)
    for e in range(E):
        width = widths[e % len(widths)]
        for used, beyond in (
            (gradients["w_in"][e, :, :, :width], gradients["w_in"][e, :, :, width:]),
            (gradients["w_out"][e, :width], gradients["w_out"][e, width:]),
        ):
            assert np.any(used) and not np.any(beyond)


# Condition.


@pytest.fixture(scope="module")
def conditioned():
    """A model of one layer whose router knows two tasks, its variables, and (condition) -> output."""
    attention = c.Attention(projection=c.GroupedQuery(2, 1, 4), pattern=c.Full(), implementation="reference")
    moe = mixture(condition=c.Condition(("prose", "code"), dim=4))
    config = tiny_model(attention=attention, moe=moe, dim=D, num_layers=1, num_dense_layers=0, vocab_size=64)
    variables = init(Transformer(config), jnp.zeros((1, 2), jnp.int32))
    tokens_BT = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
    apply = jax.jit(
        lambda variables, condition=None: Transformer(config).apply(variables, tokens_BT, condition=condition)
    )
    return config, variables, apply


def with_condition(variables, w_condition_CE):
    """Variables whose router sees the condition."""
    moe = variables["params"]["moe_layers"]["moe"] | {"w_condition": w_condition_CE[None]}
    return variables | {
        "params": variables["params"] | {"moe_layers": variables["params"]["moe_layers"] | {"moe": moe}}
    }


def test_tasks_route_differently_once_the_router_has_learned_of_them(conditioned):
    config, fresh, apply = conditioned
    learned = with_condition(fresh, jax.random.normal(jax.random.key(5), (4, E)))
    ids = [jnp.full((B, T), task, jnp.int32) for task in range(3)]
    for task in (1, 2):
        np.testing.assert_array_equal(apply(fresh, ids[task]).logits_BTV, apply(fresh, ids[0]).logits_BTV)
    chosen = [np.asarray(apply(learned, condition).routing.experts_BTK) for condition in ids]
    assert all(np.any(chosen[a] != chosen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_array_equal(apply(learned).logits_BTV, apply(learned, ids[0]).logits_BTV)
    np.testing.assert_array_equal(task_conditions(config, ["code", "speech", "prose"]), [2, 0, 1])


def test_an_embedding_is_a_condition_token_by_token(conditioned):
    _, fresh, apply = conditioned
    learned = with_condition(fresh, jax.random.normal(jax.random.key(5), (4, E)))
    ids = jnp.array([[0] * 4 + [2] * 5, [1] * 9], jnp.int32)
    embeddings = fresh["params"]["condition_embedding"][ids]
    by_id, by_embedding = apply(learned, ids), apply(learned, embeddings)
    np.testing.assert_array_equal(by_id.logits_BTV, by_embedding.logits_BTV)
    # The shift of the logits is embedding · w_condition: where only the condition differs, so do the scores.
    params = learned["params"]["moe_layers"]["moe"]
    plain, shifted = (jnp.log(apply(learned, condition).routing.scores_BTE[0]) for condition in (0 * embeddings, ids))
    shift = embeddings @ params["w_condition"][0]
    expected = jax.nn.log_softmax(plain + shift, axis=-1)
    assert_close(shifted, expected, 1e-5)


def test_conditions_that_do_not_fit_are_refused(conditioned):
    config, variables, apply = conditioned
    with pytest.raises(ValueError, match=r"condition has shape"):
        apply(variables, jnp.zeros((B, T, 3)))
    plain = dataclasses.replace(config, moe=mixture())
    with pytest.raises(ValueError, match=r"config.moe.condition is none"):
        Transformer(plain).apply(variables, jnp.zeros((1, 2), jnp.int32), condition=jnp.zeros((1, 2), jnp.int32))


@pytest.mark.quick
def test_load_by_context_counts_real_tokens_of_each_context():
    random = np.random.default_rng(0)
    L, contexts = 2, 3
    experts = random.integers(0, E + 1, (L, B, T, K))  # E: absent
    context, mask = random.integers(0, contexts, (B, T)), random.random((L, B, T)) < 0.7  # another in each layer
    expected = np.zeros((L, contexts, E))
    for layer, b, t, k in np.ndindex(L, B, T, K):
        if mask[layer, b, t] and experts[layer, b, t, k] < E:
            expected[layer, context[b, t], experts[layer, b, t, k]] += 1
    np.testing.assert_array_equal(load_by_context(experts, context, jnp.asarray(mask), contexts, E), expected)


# Noise and dropout.


@pytest.mark.parametrize("changes", [{"router_noise": 2.0}, {"expert_dropout": 0.5}], ids=str)
def test_exploration_is_of_training_alone_and_differs_by_layer(changes):
    x_BTD, module = tokens(), MoE(CONFIG, mixture(**changes))
    plain = MoE(CONFIG, mixture())
    variables = init(plain, x_BTD, packing())
    run = jax.jit(module.apply)

    def apply(packing):
        return run(variables, x_BTD, packing)

    y_BTD, routing, _ = jax.jit(plain.apply)(variables, x_BTD, packing())
    np.testing.assert_array_equal(apply(packing())[0], y_BTD)
    chosen = [np.asarray(apply(packing(seed=0).at_layer(layer))[1].experts_BTK) for layer in range(3)]
    for experts in chosen:
        assert np.any(np.sort(experts) != np.sort(routing.experts_BTK))
    assert np.any(chosen[0] != chosen[1]) and np.any(chosen[1] != chosen[2])
    # Only the choice is random: a chosen expert weighs what its own score says.
    noisy = apply(packing(seed=0))[1]
    np.testing.assert_array_equal(noisy.scores_BTE, routing.scores_BTE)
    own_BTK = np.take_along_axis(np.asarray(routing.scores_BTE), np.asarray(noisy.experts_BTK), axis=-1)
    np.testing.assert_allclose(noisy.weights_BTK, own_BTK / own_BTK.sum(-1, keepdims=True), rtol=1e-5)


ROUTERS = [
    c.Softmax(top_k=K),
    c.GroupedSigmoid(top_k=K, num_groups=1, top_groups=1),
    c.ProbabilityMass(k_min=1, k_max=K, target_k=2.0),
]


@pytest.mark.quick
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.kind)
@pytest.mark.parametrize(("noise", "dropout"), [(3.0, 0.0), (0.0, 0.6), (3.0, 0.95)])
def test_exploration_never_picks_an_inactive_expert(router, noise, dropout):
    bias_E = jnp.array([0.0, -jnp.inf, 0.1, 0.0, -jnp.inf, 0.0])
    rows = 32
    exploration = Exploration(jax.random.split(jax.random.key(0), rows), noise, dropout)
    logits_BTE = jax.random.normal(jax.random.key(1), (rows, T, E)).at[..., 1].set(9.0)
    routing = route(router, logits_BTE, bias_E, jnp.ones((rows, T), bool), exploration=exploration)
    experts = np.asarray(routing.experts_BTK)
    assert not np.any(np.isin(experts, (1, 4))) and np.all(np.isfinite(routing.weights_BTK))
    distinct = np.sort(experts, axis=-1)
    assert np.all((distinct[..., 1:] != distinct[..., :-1]) | (distinct[..., 1:] == E))


@pytest.mark.quick
def test_dropout_hides_experts_from_a_whole_row_unless_too_few_are_left():
    rows, length, experts, router = 400, 64, 8, c.Softmax(top_k=2)
    logits_BTE = jax.random.normal(jax.random.key(1), (rows, length, experts))

    def used_of_rows(dropout):
        """Which experts each row uses, [rows, experts]; 128 choices leave none out by chance."""
        exploration = Exploration(jax.random.split(jax.random.key(0), rows), 0.0, dropout)
        mask_BT = jnp.ones((rows, length), bool)
        chosen = route(router, logits_BTE, jnp.zeros(experts), mask_BT, exploration=exploration).experts_BTK
        return np.any(np.asarray(chosen)[..., None] == np.arange(experts), axis=(1, 2))

    assert np.all(used_of_rows(0.0))
    # A row with one or none left (8 and 1 of 256 at one half) uses all others too.
    hidden = 1 - used_of_rows(0.5).mean(axis=0)
    expected = 0.5 - 8 / 256 * 7 / 8 - 1 / 256
    deviation = 0.5 / math.sqrt(rows)
    assert np.all(np.abs(hidden - expected) < 4 * deviation), (hidden, expected)
    assert np.all(used_of_rows(0.999).sum(axis=1) >= 2)


# Softmax over the active experts alone.


@pytest.mark.quick
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.kind)
def test_gradients_are_finite_when_all_but_k_experts_are_inactive(router):
    active = np.array([0, 2, 5])
    bias_E = jnp.full((E,), -jnp.inf).at[active].set(0.0)
    logits_BTE = jax.random.normal(jax.random.key(1), (B, T, E)).at[..., 1].set(1e4).at[..., 3].set(-1e4)
    weights_BTE = jax.random.normal(jax.random.key(2), (B, T, E))

    def loss(logits_BTE):
        routing = route(router, logits_BTE, bias_E, jnp.ones((B, T), bool), mass=2.0)
        total = jnp.sum(routing.scores_BTE * weights_BTE) + jnp.sum(routing.weights_BTK * weights_BTE[..., :K])
        return total + routing.sums["balance"] + routing.sums["z"], routing

    gradients, routing = jax.jit(jax.grad(loss, has_aux=True))(logits_BTE)
    np.testing.assert_array_equal(np.sort(routing.experts_BTK), np.broadcast_to(active, (B, T, K)))
    assert np.all(np.isfinite(gradients)) and np.all(np.any(gradients[..., active], axis=(0, 1)))
    np.testing.assert_array_equal(np.delete(np.asarray(gradients), active, axis=-1), 0)
    assert np.all(np.isfinite([float(value) for value in routing.sums.values()]))


@pytest.mark.quick
def test_the_softmax_of_active_experts_is_that_of_them_alone():
    active_E = np.array([True, False, True, True, False, True])
    logits_E, cotangent_E = jax.random.normal(jax.random.key(0), (2, E))

    def masked(logits_E):
        return jnp.sum(jax.nn.softmax(logits_E, where=active_E) * cotangent_E)

    def alone(logits_E):
        return jnp.sum(jax.nn.softmax(logits_E[active_E]) * cotangent_E[active_E])

    assert_close(jax.jit(jax.value_and_grad(masked))(logits_E), jax.jit(jax.value_and_grad(alone))(logits_E), 1e-6)


# Probability mass.

MASS = c.ProbabilityMass(k_min=1, k_max=4, target_k=2.5, mass=0.6, mass_update_rate=0.05)


@pytest.mark.quick
@pytest.mark.parametrize("router", [MASS, dataclasses.replace(MASS, k_min=2, normalize_weights=False)], ids=str)
def test_mass_router_is_the_loop(router):
    logits = np.asarray(2 * jax.random.normal(jax.random.key(0), (B, T, E)), np.float64)
    run = jax.jit(lambda mass: route(router, jnp.float32(logits), jnp.zeros(E), jnp.ones((B, T), bool), mass))
    for mass in (None, 0.0, 0.35, 0.9, 1.0):
        routing, wanted = run(mass), router.mass if mass is None else mass
        for b, t in np.ndindex(B, T):
            scores = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
            chosen, held = [], 0.0
            for e in np.argsort(-scores)[: router.k_max]:
                if len(chosen) >= router.k_min and held >= wanted:
                    break
                chosen.append(int(e))
                held += scores[e]
            assert routing.experts_BTK[b, t].tolist() == chosen + [E] * (router.k_max - len(chosen))
            weights = np.zeros(router.k_max)
            weights[: len(chosen)] = scores[chosen] / (held if router.normalize_weights else 1)
            np.testing.assert_allclose(routing.weights_BTK[b, t], weights, rtol=1e-5)
        count_BT = np.sum(np.asarray(routing.experts_BTK) < E, axis=-1)
        assert count_BT.min() >= router.k_min and count_BT.max() <= router.k_max
        assert float(routing.load_E.sum()) == count_BT.sum()
        if mass in (0.0, 1.0):
            assert np.all(count_BT == (router.k_min if mass == 0 else router.k_max))


@pytest.mark.quick
@pytest.mark.parametrize(("target", "start"), [(1.5, 0.9), (2.5, 0.6), (3.5, 0.1)])
def test_updates_hold_the_mean_number_of_experts_at_its_target(target, start):
    router = dataclasses.replace(MASS, target_k=target)
    logits_BTE = jax.random.normal(jax.random.key(0), (8, 64, E))
    mask_BT = jnp.ones((8, 64), bool)

    def update(mass, _):
        mean_k = jnp.sum(route(router, logits_BTE, jnp.zeros(E), mask_BT, mass).load_E) / mask_BT.size
        return update_mass(mass, mean_k, router), mean_k

    mass, mean_k = jax.lax.scan(update, jnp.float32(start), length=200)
    assert abs(float(mean_k[0]) - target) > 0.1
    assert abs(float(mean_k[-20:].mean()) - target) < 0.05 and 0 < float(mass) < 1


def test_a_layer_s_mass_decides_how_many_experts_work():
    module, x_BTD = MoE(CONFIG, mixture(router=MASS)), 3 * tokens()
    variables = init(module, x_BTD, packing())
    apply = jax.jit(module.apply)
    counts = []
    for mass in (0.0, 0.6, 1.0):
        state = variables["selection_bias"] | {"mass": jnp.float32(mass)}
        _, routing, _ = apply(variables | {"selection_bias": state}, x_BTD, packing())
        counts.append(float(routing.load_E.sum()) / (B * T))
    assert counts[0] == 1.0 < counts[1] < counts[2] == 4.0
    assert float(variables["selection_bias"]["mass"]) == pytest.approx(MASS.mass)
