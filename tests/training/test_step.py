"""One step: loss terms and gradients do not depend on micro-batches or on the mesh, and every term moves something."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.sharding import make_mesh, partition_spec, shardings
from dsv3_jax.training.loop import TrainingError, check_terms
from dsv3_jax.training.step import Load, Trainer, TrainState
from tests.conftest import assert_close, random_batch, tiny_config


def trainer_for(corpus, mesh: c.MeshConfig | None = None, batch_size=8, **train) -> Trainer:
    config = tiny_config(corpus, batch_size=batch_size, **train)
    config.mesh = mesh or c.MeshConfig()
    return Trainer(config.validate(), make_mesh(config.mesh))


@pytest.fixture(scope="module")
def plain(corpus):
    """One device, one batch: trainer, batch, the state before (on the host), and state and metrics after a step."""
    trainer = trainer_for(corpus)
    batch = random_batch(trainer.config)
    before = jax.device_get(trainer.init(0))
    after = jax.device_get(trainer.step(jax.device_put(before, trainer.state_shardings), batch))
    return trainer, batch, before, after


def assert_same_step(trainer, before, batch, expected) -> TrainState:
    """The step from `before` gives the expected metrics, loads and gradients (Adam's first moment after one step)."""
    state, metrics = trainer.step(jax.device_put(before, trainer.state_shardings), batch)
    expected_state, expected_metrics = expected
    # float32 sums in another order
    assert_close(metrics, expected_metrics, 2e-5)
    assert_close(state.opt_state[1].mu, expected_state.opt_state[1].mu, 2e-5)
    assert_close(state.opt_state[1].nu, expected_state.opt_state[1].nu, 4e-5)
    for a, b in zip(jax.tree.leaves(state.selection_bias), jax.tree.leaves(expected_state.selection_bias), strict=True):
        np.testing.assert_array_equal(a, b)
    return state


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_microbatches_add_up_to_the_batch(plain, corpus, microbatches):
    _, batch, before, after = plain
    assert_same_step(trainer_for(corpus, microbatches=microbatches), before, batch, after)


@pytest.mark.quick
def test_modules_that_nothing_trains_are_refused(corpus):
    config = tiny_config(corpus)
    for mtp in (c.MultiToken(1, 0.0), c.MultiToken(1, 0.0, 0.1, 20), c.MultiToken(1, 0.0, 0.0, 5)):
        config.model.mtp = mtp
        with pytest.raises(c.ConfigError, match="mtp.weight=0.0: computes modules that nothing trains"):
            config.validate()
    for mtp in (c.MultiToken(1, 0.0, 0.1, 19), c.MultiToken(1, 0.1, 0.0, 5)):
        config.model.mtp = mtp
        config.validate()


@pytest.mark.quick
def test_the_log_tells_a_domain_without_tokens_from_one_whose_router_collapsed(corpus):
    config = tiny_config(corpus)
    config.model.moe.condition = c.Condition(("words",), 4)
    domain = config.data.domains[0]
    config.data.domains = (domain, dataclasses.replace(domain, name="other"))
    trainer = Trainer(config.validate(), make_mesh(config.mesh))
    load_CE = np.zeros((2, 8), np.float32)
    load_CE[0, 3] = 6
    loads = {"moe_layers": Load(load_CE.sum(axis=0)[None], np.full(1, 3.0), load_CE[None])}
    segments = np.asarray([[1, 1, 1, 0]])
    batch = {"segment_ids": segments, "domain": np.zeros_like(segments)}
    metrics = trainer._statistics({"dropped": np.float32(0)}, loads, batch, {"moe_layers": np.full(1, 8)})
    seen = {name: float(metrics[f"router/{name}"]) for name in ("entropy/words", "entropy/other")}
    assert seen == {"entropy/words": 0, "entropy/other": 0}
    assert metrics["router/tokens/words"] == 3 and metrics["router/tokens/other"] == 0


@pytest.mark.slow
def test_what_is_random_does_not_depend_on_microbatches(corpus):
    """A row has its own keys: experts drop out and units are drawn alike in whichever micro-batch it is."""

    def random_gradients(microbatches, *seeds):
        config = tiny_config(corpus, batch_size=4, microbatches=microbatches)
        config.model.moe.expert_dropout, config.model.unit_gate = 0.3, c.UnitGate(blocks=4, gate_dim=4)
        trainer = Trainer(config.validate(), make_mesh(config.mesh))
        state, batch = trainer.init(0), random_batch(config)
        return [trainer.gradients(state.replace(seed=np.uint32(seed)), batch) for seed in seeds]

    first, other = random_gradients(1, 0, 1)
    assert_close(random_gradients(2, 0)[0], first, 2e-5)  # float32 sums in another order
    assert abs(float(other[1]["lm"]) - float(first[1]["lm"])) > 1e-4


def with_pattern(corpus, pattern, **train) -> Trainer:
    config = tiny_config(corpus, batch_size=8, **train)
    config.model.attention.pattern = pattern
    return Trainer(config.validate(), make_mesh(config.mesh))


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(c.Sparse(6, 2, 8), marks=pytest.mark.slow),
        pytest.param(c.LearnedGlobal(4, 4, 2), marks=pytest.mark.slow),
        pytest.param(c.PerLayer((c.Windowed(4), c.Full())), marks=pytest.mark.slow),
    ],
    ids=lambda pattern: pattern.kind,
)
def test_learned_patterns_add_up_over_microbatches_devices_and_remat(pattern, corpus):
    def gradients(microbatches=1, mesh=None, remat="none"):
        config = tiny_config(corpus, batch_size=8, microbatches=microbatches)
        config.model.attention.pattern, config.model.remat = pattern, remat
        config.mesh = mesh or c.MeshConfig()
        trainer = Trainer(config.validate(), make_mesh(config.mesh))
        return trainer.gradients(trainer.init(0), random_batch(config))

    expected = gradients()
    assert set(expected[1]) == {"lm", "balance"} | ({"indexer"} if isinstance(pattern, c.Sparse) else set())
    # float32 sums in another order
    assert_close(gradients(microbatches=2, mesh=c.MeshConfig(data=2, model=2), remat="full"), expected, 5e-5)


def test_warming_up_trains_the_indexer_alone_and_its_loss_falls(corpus):
    trainer = with_pattern(corpus, c.Sparse(6, 2, 8, stage="warmup"), trainable=("indexer",))
    state, batch = trainer.init(0), random_batch(trainer.config)
    before, losses = jax.device_get(state), []
    for _ in range(12):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss/indexer"]))
    assert losses[-1] < 0.9 * losses[0]
    after = jax.device_get(state)
    for path, old in jax.tree_util.tree_flatten_with_path(before.variables())[0]:
        new = after.variables()
        for key in path:
            new = new[key.key]
        assert np.any(old != new) == any(key.key == "indexer" for key in path), path


@pytest.mark.slow
def test_the_domain_of_a_token_decides_its_window(corpus):
    windows = (c.TaskWindow("words", 2),)
    batch = random_batch(tiny_config(corpus, batch_size=8))

    def loss(pattern):
        trainer = with_pattern(corpus, pattern)
        return float(trainer.gradients(trainer.init(0), batch)[1]["lm"])

    assert loss(c.RuntimeWindowed(8, tasks=windows)) == pytest.approx(loss(c.Windowed(2)), rel=1e-6)
    assert loss(c.RuntimeWindowed(8, tasks=windows)) != pytest.approx(loss(c.Windowed(8)), rel=1e-6)


@pytest.mark.slow
def test_layers_with_other_largest_windows_train_with_their_own(corpus):
    def loss(*members):
        trainer = with_pattern(corpus, c.PerLayer(members))
        return float(trainer.gradients(trainer.init(0), random_batch(trainer.config))[1]["lm"])

    assert loss(c.RuntimeWindowed(2), c.RuntimeWindowed(16)) == pytest.approx(loss(c.Windowed(2), c.Windowed(16)), 1e-6)


def test_a_word_that_names_nothing_trainable_is_refused(corpus):
    with pytest.raises(c.ConfigError, match=r"'indexr' is in no parameter's path; known: .*attention"):
        trainer_for(corpus, trainable=("indexr",))


MESHES = {
    "data, fsdp, model": c.MeshConfig(data=2, fsdp=2, model=2),
    "fsdp, expert, model": c.MeshConfig(fsdp=2, expert=2, model=2),
    "data 8": c.MeshConfig(data=8),
    "fsdp 4": c.MeshConfig(fsdp=4),
    "expert 4": c.MeshConfig(expert=4),
    "model 2": c.MeshConfig(model=2),
}
SLOW = [name for name in MESHES if name != "fsdp, expert, model"]  # which shards all that can be


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MESHES])
def test_sharded_equals_unsharded(plain, corpus, name):
    _, batch, before, after = plain
    trainer, mesh = trainer_for(corpus, MESHES[name]), MESHES[name]
    state = assert_same_step(trainer, before, batch, after)
    # The arrays lie where the rules say, and the optimizer's moments beside them.
    w_in = state.params["moe_layers"]["moe"]["w_in"]
    shape = w_in.sharding.shard_shape(w_in.shape)
    assert shape == (1, 8 // mesh.expert, 32 // mesh.fsdp, 2, 16 // mesh.model)
    assert state.opt_state[1].mu["moe_layers"]["moe"]["w_in"].sharding == w_in.sharding
    tokens = trainer.compiled.input_shardings[0][1]["tokens"]
    assert tokens.shard_shape((8, 32)) == (8 // (mesh.data * mesh.fsdp * mesh.expert), 32)


@pytest.mark.quick
def test_rules_refuse_typos_collisions_and_sizes_that_do_not_divide(corpus):
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        partition_spec(("batch", "hedas"))
    with pytest.raises(ValueError, match="both map to mesh axis 'model'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(c.ConfigError, match="needs 16 devices, 8 are visible"):
        make_mesh(c.MeshConfig(data=16))
    config = tiny_config(corpus)
    config.mesh = c.MeshConfig(model=8)
    with pytest.raises(c.ConfigError, match=r"'heads' of .* has size 2, which 8 shards"):
        Trainer(config, make_mesh(config.mesh))
    with pytest.raises(ValueError, match="has no logical axes"):
        shardings(make_mesh(c.MeshConfig()), {"w": np.zeros(3)})


def test_bias_moves_by_its_rate_towards_balance_and_padding_counts_nowhere(plain):
    trainer, batch, before, (state, metrics) = plain
    moved = np.asarray(state.selection_bias["moe_layers"]["moe"]["bias"])
    rate = trainer.config.model.moe.router.bias_update_rate
    assert set(np.round(np.abs(moved[moved != 0]) / rate, 3)) == {1.0} and moved.min() < 0 < moved.max()
    assert metrics["router/dropped"] == 0
    padding = batch["segment_ids"] == 0
    garbage = batch | {
        "tokens": np.where(padding, 5, batch["tokens"]),
        "targets": np.where(padding, 9, batch["targets"]),
    }
    assert_same_step(trainer, before, garbage, (state, metrics))


def test_loss_falls_on_a_repeated_batch(plain):
    trainer, batch, before, _ = plain
    state, losses = jax.device_put(before, trainer.state_shardings), []
    for _ in range(8):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8


@pytest.mark.quick
def test_a_term_that_is_on_and_zero_or_not_finite_stops_training():
    check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 1.0}, {"lm": 1.0, "balance": 0.1})
    check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 0.0}, {"lm": 1.0, "balance": 0.0})
    check_terms(3, {"loss": 1.0, "loss/activation": 0.0}, {"activation": 1.0})  # exactly on target
    check_terms(3, {"loss": 1.0, "loss/mtp_2": 0.0, "tokens/mtp_2": 0.0}, {"mtp_2": 0.1})  # no document is long enough
    with pytest.raises(TrainingError, match="loss/mtp_2 is on"):
        check_terms(3, {"loss": 1.0, "loss/mtp_2": 0.0, "tokens/mtp_2": 5.0}, {"mtp_2": 0.1})
    with pytest.raises(TrainingError, match="step 3: loss/balance is on .* exactly zero"):
        check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 0.0}, {"lm": 1.0, "balance": 0.1})
    with pytest.raises(TrainingError, match="step 3: grad_norm is nan"):
        check_terms(3, {"loss": 1.0, "grad_norm": float("nan")}, {})
