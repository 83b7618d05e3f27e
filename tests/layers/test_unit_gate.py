"""The unit gate: hard forward, soft backward, the right share, and random keys that are what they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.layers.inputs import Packing, make_packing
from dsv3_jax.layers.mlp import BlockSwitches, SwiGLU, switch
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.step import Trainer
from tests.conftest import assert_close, random_batch, tiny_config

B, T, D, J = 4, 32, 6, 4
GATE = c.UnitGate(blocks=J, gate_dim=5, target=0.7)
CONFIG = c.ModelConfig(dim=D, unit_gate=GATE)
SWITCHES = BlockSwitches(CONFIG, GATE)


def packing(batch=B, seed: int | None = None, real=T) -> Packing:
    """Rows of one document of `real` tokens, with a key a row if there is a seed."""
    position_BT = jnp.broadcast_to(jnp.arange(T), (batch, T))
    place = Place(position_BT, (position_BT < real).astype(jnp.int32))
    key_B = None if seed is None else jax.random.split(jax.random.key(seed), batch)
    return dataclasses.replace(make_packing(CONFIG, place), key_B=key_B)


def init(module, seed=0):
    return nn.unbox(jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, T, D)), packing(1)))["params"]


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


@jax.jit
def run_switches(params, x_BTD, packing):
    return SWITCHES.apply({"params": params}, x_BTD, packing)


@pytest.fixture(scope="module")
def params():
    return init(SWITCHES)


def switched(params, x_BTD, packing):
    on_BTJ, sums = run_switches(params, x_BTD, packing)
    return np.asarray(on_BTJ), sums


@pytest.mark.quick
def test_forward_is_hard_and_the_gradient_is_the_soft_gate_s():
    logits, noise = jnp.linspace(-3, 3, 13), jnp.tile(jnp.array([0.0, 1.3, -0.8]), 5)[:13]
    np.testing.assert_array_equal(switch(logits, noise, 0.5), np.asarray(logits + noise > 0, np.float32))
    weights = jnp.arange(1.0, 14.0)
    hard = jax.grad(lambda x: jnp.sum(weights * switch(x, noise, 0.5)))(logits)
    soft = jax.grad(lambda x: jnp.sum(weights * jax.nn.sigmoid((x + noise) / 0.5)))(logits)
    np.testing.assert_allclose(hard, soft, rtol=1e-6)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.0])
def test_noise_is_logistic_the_share_on_is_the_sigmoid_of_the_logit(bias, params):
    params = jax.tree.map(jnp.zeros_like, params) | {"bias": jnp.full((J,), bias)}
    batch = 128
    on_BTJ, _ = switched(params, jnp.ones((batch, T, D)), packing(batch, seed=0))
    share = 1 / (1 + np.exp(-bias))
    deviation = np.sqrt(share * (1 - share) / on_BTJ.size)
    assert abs(on_BTJ.mean() - share) < 4 * deviation
    # Tokens, blocks and rows draw alike, each on its own.
    for axis in range(3):
        means = on_BTJ.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(means - share).max() < 5 * np.sqrt(share * (1 - share) * on_BTJ.shape[axis] / on_BTJ.size)


def test_evaluation_switches_by_sign_and_always_alike(params):
    x_BTD = 3 * tokens()
    on_BTJ, _ = switched(params, x_BTD, packing())
    hidden = np.asarray(x_BTD @ params["w_gate_in"], np.float64)
    logits = hidden / (1 + np.exp(-hidden)) @ params["w_gate_out"] + params["bias"]
    np.testing.assert_array_equal(on_BTJ, logits > 0)
    assert 0 < on_BTJ.mean() < 1
    np.testing.assert_array_equal(on_BTJ, switched(params, x_BTD, packing())[0])


def test_the_loss_counts_real_tokens_of_each_sequence(params):
    on_BTJ, sums = switched(params, 3 * tokens(), packing(real=20))
    share_B = on_BTJ[:, :20].mean(axis=(1, 2))
    assert float(sums["activation"]) == pytest.approx(np.sum((share_B - GATE.target) ** 2), rel=1e-4)
    assert float(sums["active_units"]) == pytest.approx(on_BTJ[:, :20].mean(axis=2).sum(), rel=1e-5)
    _, empty = switched(params, tokens(), packing(real=0))
    assert float(empty["activation"]) == float(empty["active_units"]) == 0


def test_the_budget_loss_alone_moves_the_share_to_the_target(params):
    x_BTD = tokens()  # begins at a share near 0.7
    gate = dataclasses.replace(GATE, target=0.3)
    module = BlockSwitches(CONFIG, gate)

    @jax.jit
    def step(params, seed):
        def loss(params):
            _, sums = module.apply({"params": params}, x_BTD, packing(seed=seed))
            return sums["activation"] / B, sums["active_units"] / (B * T)

        gradients, share = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 3.0 * g, params, gradients), share

    shares = []
    for seed in range(120):
        params, share = step(params, seed)
        shares.append(float(share))
    assert shares[0] > 0.4
    on_BTJ, _ = module.apply({"params": params}, x_BTD, packing())  # as in evaluation, without draws
    assert abs(np.mean(on_BTJ) - gate.target) < 0.03
    assert shares[-1] == pytest.approx(float(np.mean(on_BTJ)), abs=0.03)


def test_units_that_are_off_neither_count_nor_learn():
    module = SwiGLU(CONFIG, 2 * J)
    params = init(module)
    params["gate"]["bias"] = jnp.array([9.0, -9.0, 9.0, -9.0])  # beyond what noise reaches here
    x_BTD, unit_on = 0.1 * tokens(), np.repeat([True, False, True, False], 2)

    @jax.jit
    def run(params, place):
        def output(params):
            y_BTD, _ = module.apply({"params": params}, x_BTD, place)
            return jnp.sum(jnp.square(y_BTD)), y_BTD

        return jax.grad(output, has_aux=True)(params)

    gradients, y_BTD = run(params, packing())
    gate, up = jnp.einsum("BTD,DxF->xBTF", x_BTD, params["w_in"])
    expected = (jax.nn.silu(gate) * up)[..., unit_on] @ params["w_out"][unit_on]
    assert_close(y_BTD, expected, 1e-5)
    assert not np.any(np.asarray(gradients["w_out"])[~unit_on]) and np.all(np.any(gradients["w_out"], axis=1)[unit_on])
    assert not np.any(np.asarray(gradients["w_in"])[..., ~unit_on])


def test_keys_differ_by_row_layer_and_use(params):
    x_BTD = jnp.zeros((B, T, D))
    plain = packing(seed=0)
    on_BTJ, _ = switched(params, x_BTD, plain)
    np.testing.assert_array_equal(on_BTJ, switched(params, x_BTD, plain)[0])
    for other in range(1, B):
        assert np.any(on_BTJ[0] != on_BTJ[other])
    layers = [switched(params, x_BTD, plain.at_layer(layer))[0] for layer in range(2)]
    assert np.any(layers[0] != layers[1])
    # A row has its own draws, whatever its micro-batch.
    last = dataclasses.replace(jax.tree.map(lambda x: x[2:], plain), key_B=plain.key_B[2:])
    np.testing.assert_array_equal(switched(params, x_BTD[2:], last)[0], on_BTJ[2:])
    # What a router would draw from the same keys is something else.
    router_BTJ = jax.vmap(lambda key: jax.random.logistic(key, (T, J)))(plain.key_B)
    bias = float(jnp.log(GATE.target / (1 - GATE.target)))
    agree = np.mean(on_BTJ == np.asarray(router_BTJ + bias > 0))
    assert agree < 0.75  # of independent draws 0.7² + 0.3² agree


@pytest.fixture(scope="module")
def trainers(corpus):
    """One dense layer with a gate, by 1 and 2 micro-batches."""
    trainers = []
    for microbatches in (1, 2):
        config = tiny_config(corpus, batch_size=4, microbatches=microbatches)
        attention = c.Attention(projection=c.GroupedQuery(2, 1, 4), pattern=c.Full(), implementation="reference")
        config.model = c.ModelConfig(
            vocab_size=320, dim=8, num_layers=1, dense_dim=16, attention=attention, moe=None, unit_gate=GATE
        )
        trainers.append(Trainer(config.validate(), make_mesh(config.mesh)))
    return trainers


@pytest.mark.slow
def test_keys_differ_by_step_and_seed_but_not_by_micro_batch(trainers):
    one, two = trainers
    state, batch = one.init(0), random_batch(one.config)
    gradients, terms = one.gradients(state, batch)
    assert_close(two.gradients(state, batch), (gradients, terms), 2e-5)  # float32 sums in another order
    assert float(terms["activation"]) > 0
    for change in ({"step": state.step + 1}, {"seed": np.uint32(5)}):
        other, other_terms = one.gradients(dataclasses.replace(state, **change), batch)
        assert float(other_terms["lm"]) != float(terms["lm"])
        first, second = (tree["dense_layers"]["mlp"]["w_out"] for tree in (gradients, other))
        assert np.any(np.asarray(first) != second)  # other units were on
        # The budget holds evaluation's share, which nothing draws.
        assert float(other_terms["activation"]) == float(terms["activation"])
