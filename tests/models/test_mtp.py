"""Multi-token prediction against a plain loop over modules; packing, causality, decoding; and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.layers.block import Block
from dsv3_jax.layers.inputs import make_packing
from dsv3_jax.models.stack import unstack_layers
from dsv3_jax.models.transformer import Transformer, make_prediction_cache, summed_loss
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.loop import check_terms
from dsv3_jax.training.step import Trainer
from dsv3_jax.training.terms import loss_terms, term_weights
from tests.conftest import assert_close, random_batch, tiny_config, tiny_model

B, T, DEPTH = 4, 10, 2
# Two layers take these in turn, then the modules.
PATTERNS = (c.Windowed(4, (0,)), c.Full())
LATE = 3  # the step from which the losses weigh nothing


def model(**changes) -> c.ModelConfig:
    attention = c.Attention(c.GroupedQuery(2, 2, 16), c.PerLayer(PATTERNS))
    mtp = c.MultiToken(DEPTH, weight=0.4, late_weight=0.0, late_step=LATE)
    return tiny_model(**{"attention": attention, "mtp": mtp} | changes)


def trainer_for(corpus, mesh: c.MeshConfig | None = None, microbatches: int = 1, **changes) -> Trainer:
    """With the oracles of attention and dispatch, which compile faster; without clipping, so that Adam's first moment
    after one step is a tenth of the gradient."""
    config = tiny_config(corpus, batch_size=B, microbatches=microbatches)
    config.model, config.mesh = model(**changes), mesh or c.MeshConfig()
    config.model.attention.implementation = "reference"
    if config.model.moe is not None:
        config.model.moe.dispatch = c.DenseDispatch()
    config.data.sequence_length, config.train.optimizer.clip_norm = T, 1e9
    return Trainer(config.validate(), make_mesh(config.mesh))


def step(trainer: Trainer, state, batch):
    """The state and metrics after a step, on the host."""
    return jax.device_get(trainer.step(jax.device_put(state, trainer.state_shardings), batch))


def gradients_of(state) -> dict:
    """By path, of the first step."""
    flat = jax.tree_util.tree_flatten_with_path(state.opt_state[1].mu)[0]
    return {tuple(key.key for key in path): 10 * leaf for path, leaf in flat}


@pytest.fixture(scope="module")
def plain(corpus):
    """A trainer, and a state with biases that matter, on the host."""
    trainer = trainer_for(corpus)
    state = jax.device_get(trainer.init(0))
    random = np.random.default_rng(0)
    bias = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), state.selection_bias)
    return trainer, dataclasses.replace(state, selection_bias=bias)


@pytest.fixture(scope="module")
def packed(plain):
    """A batch of packed rows; the state and the metrics after a step on it."""
    trainer, state = plain
    batch = random_batch(trainer.config)
    return batch, step(trainer, state, batch)


@pytest.fixture(scope="module")
def apply(plain):
    """(tokens, segment ids) -> prediction and logits, [B, T]; positions follow from the segments."""
    _, state = plain

    @jax.jit
    def run(tokens_BT, positions_BT, segment_ids_BT):
        output = Transformer(model()).apply(
            state.variables(), tokens_BT, positions_BT, segment_ids_BT, predict_ahead=True
        )
        return output.prediction, output.hidden_BTD

    return run


def one_document(tokens_BT):
    return tokens_BT, np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def slow_loss(config: c.ModelConfig, params, selection_bias, batch):
    """Rows of one document each, cut to the positions that a module predicts from: no shifted copy, no mask."""
    variables = {"params": params, "selection_bias": selection_bias}
    output = Transformer(config).apply(variables, batch["tokens"])
    hidden_BTD, embedding_VD, head_DV = output.hidden_BTD, params["embedding"], params["head"]

    def mean_nats(out_BTD, targets_BT):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out_BTD @ head_DV), targets_BT[..., None], axis=-1))

    means = [mean_nats(hidden_BTD, batch["targets"])]
    balance = output.sums["balance"]
    for k in range(1, DEPTH + 1):
        own, bias = (jax.tree.map(lambda x: x[k - 1], tree["mtp"]) for tree in (params, selection_bias))  # noqa: B023
        ahead_BTD = norm(embedding_VD[batch["tokens"][:, k:]], own["embedding_norm"]["scale"])
        before_BTD = norm(hidden_BTD[:, : T - k], own["hidden_norm"]["scale"])
        x_BTD = jnp.concatenate([ahead_BTD, before_BTD], axis=-1) @ own["w_projection"]
        place = Place(jnp.tile(jnp.arange(T - k), (B, 1)), jnp.ones((B, T - k), jnp.int32))
        block = Block(config, config.moe, PATTERNS[(config.num_layers + k - 1) % 2], parent=None)
        variables = {"params": own["block"], "selection_bias": bias["block"]}
        hidden_BTD, more = block.apply(variables, x_BTD, make_packing(config, place))
        balance += more.routing.sums["balance"]
        means.append(mean_nats(norm(hidden_BTD, own["final_norm"]["scale"]), batch["targets"][:, k:]))
    total = means[0] + 0.4 / DEPTH * sum(means[1:]) + config.moe.router.balance_weight * balance / (B * (1 + DEPTH))
    return total, means


def test_losses_and_gradients_are_those_of_a_loop_over_modules(plain):
    trainer, state = plain
    batch = random_batch(trainer.config, packed=False)
    slow = jax.jit(jax.grad(functools.partial(slow_loss, trainer.config.model), has_aux=True))
    expected, means = slow(state.params, state.selection_bias, batch)
    after, metrics = step(trainer, state, batch)
    for name, mean in zip(["lm", "mtp_1", "mtp_2"], means, strict=True):
        assert float(metrics[f"loss/{name}"]) == pytest.approx(float(mean), rel=2e-6), name
    gradients = gradients_of(after)
    for path, gradient in jax.tree_util.tree_flatten_with_path(expected)[0]:
        assert float(np.abs(gradient).max()) > 0, path
        assert_close(gradients[tuple(key.key for key in path)], gradient, 5e-5, str(path))  # sums in another order


def test_documents_of_a_row_do_not_see_each_other(apply):
    """Documents of 5, 1 and 2 tokens and padding in one row, and each of them alone, padded."""
    lengths = (5, 1, 2)
    tokens, positions, segments = (np.zeros((B, T), np.int32) for _ in range(3))
    tokens[:] = np.random.default_rng(0).integers(0, 320, (B, T))
    starts = np.cumsum((0, *lengths))
    positions[0, starts[-1] :] = np.arange(T - starts[-1])
    for index, length in enumerate(lengths, 1):
        span = slice(starts[index - 1], starts[index])
        tokens[index, :length] = tokens[0, span]
        positions[0, span], segments[0, span] = np.arange(length), index
        positions[index], segments[index, :length] = np.arange(T), 1
    prediction, _ = apply(tokens, positions, segments)
    assert prediction.segment_ids_kBT[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 3, 0, 0, 0]
    assert prediction.segment_ids_kBT[1, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    for k in range(DEPTH):
        for index, length in enumerate(lengths, 1):
            n = max(length - k - 1, 0)
            together = prediction.hidden_kBTD[k, 0, starts[index - 1] : starts[index - 1] + n]
            assert_close(together, prediction.hidden_kBTD[k, index, :n], 1e-5)
    real = np.array([2 * (4 + 1), 2 * 3])  # together and alone
    np.testing.assert_array_equal(prediction.routing.load_E.sum(axis=-1), 2 * real)  # two experts a token


def test_a_module_sees_no_token_further_than_its_own(apply):
    tokens = np.random.default_rng(1).integers(0, 320, (B, T))
    cut = 7
    changed = tokens.copy()
    changed[:, cut:] = (changed[:, cut:] + 7) % 320
    before, after = (apply(*one_document(t))[0].hidden_kBTD for t in (tokens, changed))
    for k in range(DEPTH):
        last = cut - k - 1  # the first position that sees token `cut`
        assert_close(after[k, :, :last], before[k, :, :last], 1e-6)
        assert np.abs(np.asarray(after - before)[k, :, last]).min(axis=-1).max() > 0


def test_predict_agrees_with_training_with_and_without_a_cache(plain, apply):
    config, variables = model(), plain[1].variables()
    tokens = np.random.default_rng(2).integers(0, 320, (B, T))
    prediction, hidden_BTD = apply(*one_document(tokens))
    alone = unstack_layers(config, variables)
    assert len(alone["params"]["mtp"]) == DEPTH
    predict = jax.jit(functools.partial(Transformer(config).apply, method="predict"), static_argnums=1)
    for index in range(DEPTH):
        n, ahead = T - 1 - index, tokens[:, index + 1 :]
        expected = prediction.hidden_kBTD[index, :, :n]
        next_BTD, normed_BTD, _ = predict(alone, index, hidden_BTD[:, :n], ahead)
        assert_close(normed_BTD, expected, 1e-5)
        cache = make_prediction_cache(config, index, B, T, step=3)
        _, normed_BTD, cache = predict(variables, index, hidden_BTD[:, :6], ahead[:, :6], cache=cache)
        assert_close(normed_BTD, expected[:, :6], 1e-5)
        for tokens_BT in ((ahead[:, 6:] + 5) % 320, ahead[:, 6:]):  # as if the first had been rejected
            cache = cache.rollback(jnp.full((B,), 6))
            _, normed_BTD, cache = predict(variables, index, hidden_BTD[:, 6:n], tokens_BT, cache=cache)
        assert_close(normed_BTD, expected[:, 6:], 1e-5)
        assert cache.length_B.tolist() == [n] * B
        hidden_BTD = next_BTD


@pytest.mark.quick
def test_predict_refuses_what_is_not_there():
    tokens, hidden = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 32))
    with pytest.raises(ValueError, match="module_index=2: config.mtp is MultiToken"):
        Transformer(model()).apply({}, 2, hidden, tokens, method="predict")
    with pytest.raises(ValueError, match="module_index=0: config.mtp is None"):
        Transformer(model(mtp=None)).apply({}, 0, hidden, tokens, method="predict")
    for index in (-1, DEPTH):
        with pytest.raises(ValueError, match=f"module_index={index}: config.mtp is MultiToken"):
            make_prediction_cache(model(), index, 1, 4)


def test_the_main_model_does_not_know_of_its_modules(plain, apply):
    """Neither when it is made nor when it runs."""
    config, params = plain[0].config.model, plain[1].params
    fresh = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert "mtp" in fresh["params"]
    other = nn.unbox(jax.jit(Transformer(model(mtp=None)).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    same = {name: tree for name, tree in params.items() if name != "mtp"}
    jax.tree.map(np.testing.assert_array_equal, same, other["params"])


# Training.


@pytest.mark.quick
def test_terms_count_what_each_module_predicts():
    config = c.Config(model=model())
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 3, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
    terms = loss_terms(config, {"segment_ids": segments}, 0)
    counts = {name: float(term.count) for name, term in terms.items()}
    # Module 1 predicts at 3 + 1 tokens of row 0 and one of row 1, module 2 at two of row 0.
    assert counts == {"lm": 9, "mtp_1": 5, "mtp_2": 2, "balance": 2 + 2 + 1}
    assert {name: term.weight for name, term in terms.items()} == {"lm": 1, "balance": 1e-2, "mtp_1": 0.2, "mtp_2": 0.2}
    config.model.moe.router.z_weight = 1e-3
    assert float(loss_terms(config, {"segment_ids": segments}, 0)["z"].count) == 9 + 5 + 2


@pytest.mark.quick
def test_the_weight_changes_at_its_step():
    config = c.Config(model=model(mtp=c.MultiToken(3, weight=0.3, late_weight=0.1, late_step=5)))
    for step, weight in ((0, 0.1), (4, 0.1), (5, 0.1 / 3), (900, 0.1 / 3)):
        assert term_weights(config, step)["mtp_3"] == pytest.approx(weight)
        assert float(jax.jit(lambda s: term_weights(config, s)["mtp_2"])(step)) == pytest.approx(weight)
    config.model.mtp.late_step = None
    assert term_weights(config, 900)["mtp_1"] == pytest.approx(0.1)


def test_every_loss_is_on_and_reaches_its_module_the_stack_embedding_and_head(plain, packed):
    """Gradients with the losses less those without: from step LATE on they weigh nothing."""
    trainer, state = plain
    batch, (after, metrics) = packed
    metrics = {name: float(value) for name, value in metrics.items()}
    check_terms(1, metrics, term_weights(trainer.config, 0))
    assert all(metrics[f"loss/mtp_{k}"] > 1 for k in (1, 2))
    assert metrics["router/mean_k"] == 2
    assert {f"router/bias_std/mtp/{k}" for k in (0, 1)} <= metrics.keys()
    on = gradients_of(after)
    off = gradients_of(step(trainer, dataclasses.replace(state, step=np.int32(LATE)), batch)[0])
    for path, without in off.items():
        assert np.abs(on[path] - without).max() > 1e-7, path
        if path[0] == "mtp" and path[-2] == "final_norm":
            assert not without.any(), path  # no other loss comes this far
    # A weight of zero is off, not broken.
    check_terms(LATE + 1, metrics | {"loss/mtp_1": 0.0}, term_weights(trainer.config, LATE))


def test_biases_of_the_modules_move_by_the_rate_towards_balance(plain, packed, apply):
    trainer, before = plain
    batch, (after, _) = packed
    rate = trainer.config.model.moe.router.bias_update_rate
    moved = after.selection_bias["mtp"]["block"]["moe"]["bias"] - before.selection_bias["mtp"]["block"]["moe"]["bias"]
    prediction, _ = apply(batch["tokens"], batch["positions"], batch["segment_ids"])
    load_kE = np.asarray(prediction.routing.load_E)
    expected = rate * np.sign(load_kE.mean(axis=-1, keepdims=True) - load_kE)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert moved.min() < 0 < moved.max()


def assert_same_step(trainer: Trainer, state, batch, expected) -> None:
    actual = step(trainer, state, batch)
    # float32 sums in another order
    assert_close(actual[1], expected[1], 2e-5)
    assert_close(actual[0].opt_state[1].mu, expected[0].opt_state[1].mu, 2e-5)
    jax.tree.map(np.testing.assert_array_equal, actual[0].selection_bias, expected[0].selection_bias)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"microbatches": 2, "remat": "full", "unroll": False}, marks=pytest.mark.slow),
        pytest.param({"microbatches": 4, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"mesh": c.MeshConfig(data=2, model=2)}, marks=pytest.mark.slow),
        pytest.param({"mesh": c.MeshConfig(fsdp=2, expert=2)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_microbatches_remat_scanning_and_devices_change_nothing(settings, corpus, plain, packed):
    batch, expected = packed
    assert_same_step(trainer_for(corpus, **settings), plain[1], batch, expected)


@pytest.mark.slow
def test_noise_does_not_depend_on_microbatches_and_differs_between_modules(corpus, plain):
    moe = dataclasses.replace(tiny_model().moe, router_noise=0.3)
    trainer = trainer_for(corpus, moe=moe)
    batch = random_batch(trainer.config)
    expected = step(trainer, plain[1], batch)
    assert_same_step(trainer_for(corpus, microbatches=2, moe=moe), plain[1], batch, expected)
    # Two modules with the same weights on the same inputs still draw other noise.
    config = dataclasses.replace(trainer.config.model, num_layers=3)
    block = Block(config, config.moe, c.Full())
    x = jax.random.normal(jax.random.key(0), (B, T, 32))
    place = Place(jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32))
    packing = dataclasses.replace(make_packing(config, place), key_B=jax.random.split(jax.random.key(1), B))
    variables = nn.unbox(block.init(jax.random.key(2), x, packing))
    chosen = [block.apply(variables, x, packing.at_layer(layer))[1].routing.experts_BTK for layer in (3, 4)]
    assert np.any(chosen[0] != chosen[1])


DENSE = {"moe": None, "num_dense_layers": 2, "tie_embeddings": True}


@pytest.mark.slow
def test_unit_gates_of_dense_modules_are_counted(corpus):
    trainer = trainer_for(corpus, **DENSE, unit_gate=c.UnitGate(blocks=4, gate_dim=4))
    state, batch = trainer.init(0), random_batch(trainer.config)
    assert state.params["mtp"]["block"]["mlp"]["w_in"].shape == (2, 32, 2, 64) and not state.selection_bias
    variables = jax.device_get(state.variables())
    # Every gate on gives a share of 1, of as many tokens and sequences as the sums were taken over.
    for parents in (("dense_layers", "mlp", "gate"), ("mtp", "block", "mlp", "gate")):
        gate = functools.reduce(lambda tree, name: tree[name], parents, variables["params"])
        gate["bias"] = np.full_like(gate["bias"], 1e3)
    _, output = jax.jit(functools.partial(summed_loss, trainer.config, predict_ahead=True))(variables, batch)
    assert output.prediction.routing is None
    tokens = 2 * (batch["segment_ids"] > 0).sum() + (np.asarray(output.prediction.segment_ids_kBT) > 0).sum()
    assert float(output.sums["active_units"]) == tokens
    count = loss_terms(trainer.config, batch, 0)["activation"].count
    assert float(output.sums["activation"] / count) == pytest.approx(0.3**2, rel=1e-4)  # of a target of 0.7


@pytest.mark.slow
def test_a_dense_tied_model_trains_its_modules(corpus):
    trainer = trainer_for(corpus, **DENSE, unit_gate=c.UnitGate(blocks=4, gate_dim=4))
    after, metrics = step(trainer, trainer.init(0), random_batch(trainer.config))
    assert 0 < float(metrics["activation/active_share"]) < 1
    for path, gradient in gradients_of(after).items():
        assert np.isfinite(gradient).all() and gradient.any(), path


@pytest.mark.slow
def test_losses_fall_on_a_repeated_batch(corpus):
    trainer = trainer_for(corpus, mtp=c.MultiToken(3))
    state, batch, losses = trainer.init(0), random_batch(trainer.config), []
    for _ in range(20):
        state, metrics = trainer.step(state, batch)
        losses.append([float(metrics[f"loss/mtp_{k}"]) for k in (1, 2, 3)])
    assert all(last < first - 0.5 for first, last in zip(losses[0], losses[-1], strict=True))
