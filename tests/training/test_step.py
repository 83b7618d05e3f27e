"""One step: loss terms and gradients do not depend on micro-batches or on the mesh, and every term moves something."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.sharding import make_mesh, partition_spec, shardings
from dsv3_jax.training.loop import TrainingError, check_terms
from dsv3_jax.training.step import Trainer
from tests.conftest import assert_close, random_batch, tiny_config


def trainer_for(corpus, mesh: c.MeshConfig | None = None, batch_size=8, **train) -> Trainer:
    config = tiny_config(corpus, batch_size=batch_size, **train)
    config.mesh = mesh or c.MeshConfig()
    return Trainer(config.validate(), make_mesh(config.mesh))


@pytest.fixture(scope="module")
def plain(corpus):
    """One device, one batch: state after a step, metrics, gradients."""
    trainer = trainer_for(corpus)
    batch = random_batch(trainer.config)
    gradients, terms = trainer.gradients(trainer.init(0), batch)
    state, metrics = trainer.step(trainer.init(0), batch)
    return trainer, batch, jax.device_get(gradients), jax.device_get(terms), jax.device_get((state, metrics))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_add_up_to_the_batch(plain, corpus, microbatches):
    _, batch, gradients, terms, (state, metrics) = plain
    trainer = trainer_for(corpus, microbatches=microbatches)
    ours, our_terms = trainer.gradients(trainer.init(0), batch)
    assert_close(ours, gradients, 1e-5)  # float32 sums in another order
    assert_close(our_terms, terms, 1e-6)
    after, our_metrics = trainer.step(trainer.init(0), batch)
    np.testing.assert_array_equal(
        after.selection_bias["moe_layers"]["moe"]["bias"], state.selection_bias["moe_layers"]["moe"]["bias"]
    )
    assert_close(our_metrics, metrics, 1e-5)


MESHES = {
    "data 4": c.MeshConfig(data=4),
    "fsdp 4": c.MeshConfig(fsdp=4),
    "expert 4": c.MeshConfig(expert=4),
    "model 2": c.MeshConfig(model=2),
    "data, fsdp, model": c.MeshConfig(data=2, fsdp=2, model=2),
    "fsdp, expert, model": c.MeshConfig(fsdp=2, expert=2, model=2),
}


@pytest.mark.parametrize("name", MESHES)
def test_sharded_equals_unsharded(plain, corpus, name):
    _, batch, gradients, terms, (state, metrics) = plain
    trainer = trainer_for(corpus, MESHES[name])
    assert_close(trainer.gradients(trainer.init(0), batch), (gradients, terms), 2e-5, name)
    after, our_metrics = trainer.step(trainer.init(0), batch)
    assert_close(our_metrics, metrics, 2e-5, name)
    np.testing.assert_array_equal(
        after.selection_bias["moe_layers"]["moe"]["bias"], state.selection_bias["moe_layers"]["moe"]["bias"]
    )
    # The arrays lie where the rules say, and the optimizer's moments beside them.
    w_in = after.params["moe_layers"]["moe"]["w_in"]
    mesh = MESHES[name]
    assert w_in.sharding.spec == partition_spec(("layers", "experts", "fsdp_embed", None, "expert_mlp"))
    shape = w_in.sharding.shard_shape(w_in.shape)
    assert shape == (1, 8 // mesh.expert, 32 // mesh.fsdp, 2, 16 // mesh.model)
    assert after.opt_state[1].mu["moe_layers"]["moe"]["w_in"].sharding == w_in.sharding


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


def test_every_loss_term_is_on_and_moves_its_own_parameters(corpus, plain):
    trainer, batch, _, terms, _ = plain
    assert set(terms) == {"lm", "balance"} and all(np.isfinite(v) and v > 0 for v in terms.values())
    config = dataclasses.replace(trainer.config)
    heavy = tiny_config(corpus, batch_size=8)
    heavy.model.moe.router.balance_weight = 1.0
    without = tiny_config(corpus, batch_size=8)
    without.model.moe.router.balance_weight = 0.0
    gradients = []
    for config in (heavy, without):
        other = Trainer(config, make_mesh(config.mesh))
        gradients.append(jax.device_get(other.gradients(other.init(0), batch)[0]))
    by_balance = jax.tree.map(lambda a, b: np.abs(a - b).max(), *gradients)
    assert by_balance["moe_layers"]["moe"]["w_router"] > 1e-5
    # The balance loss sees the router alone: neither the experts after it nor the head.
    scale = np.abs(gradients[1]["moe_layers"]["moe"]["w_in"]).max()
    assert by_balance["moe_layers"]["moe"]["w_in"] < 1e-5 * max(scale, 1)
    assert by_balance["head"] < 1e-7


def test_bias_moves_by_its_rate_towards_balance_and_padding_counts_nowhere(plain):
    trainer, batch, _, _, (state, metrics) = plain
    moved = np.asarray(state.selection_bias["moe_layers"]["moe"]["bias"])
    rate = trainer.config.model.moe.router.bias_update_rate
    assert set(np.round(np.abs(moved[moved != 0]) / rate, 3)) == {1.0} and moved.min() < 0 < moved.max()
    assert metrics["router/dropped"] == 0
    garbage = dict(batch)
    padding = batch["segment_ids"] == 0
    garbage["tokens"] = np.where(padding, 5, batch["tokens"])
    garbage["targets"] = np.where(padding, 9, batch["targets"])
    other_state, other = jax.device_get(trainer.step(trainer.init(0), garbage))
    assert_close(other["loss"], metrics["loss"], 1e-6)
    np.testing.assert_array_equal(other_state.selection_bias["moe_layers"]["moe"]["bias"], moved)


def test_loss_falls_on_a_repeated_batch(plain):
    trainer, batch, *_ = plain
    state, losses = trainer.init(0), []
    for _ in range(8):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8


@pytest.mark.quick
def test_a_term_that_is_on_and_zero_or_not_finite_stops_training():
    check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 1.0}, {"lm": 1.0, "balance": 0.1})
    check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 0.0}, {"lm": 1.0, "balance": 0.0})
    with pytest.raises(TrainingError, match="step 3: loss/balance is on .* exactly zero"):
        check_terms(3, {"loss": 1.0, "loss/lm": 1.0, "loss/balance": 0.0}, {"lm": 1.0, "balance": 0.1})
    with pytest.raises(TrainingError, match="step 3: grad_norm is nan"):
        check_terms(3, {"loss": 1.0, "grad_norm": float("nan")}, {})
