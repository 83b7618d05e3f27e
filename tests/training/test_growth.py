"""Experts that join a model: at the moment of growth nothing changes, runs resume exactly, only what should trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data.pipeline import load_dataset
from dsv3_jax.interop.huggingface import flat, nested, save_hf
from dsv3_jax.ops.routing import route, update_selection_bias
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training import growth
from dsv3_jax.training.loop import _grow, read_metrics, train
from dsv3_jax.training.sources import open_source
from dsv3_jax.training.step import Trainer
from dsv3_jax.training.upcycling import fit_experts
from tests.conftest import assert_close, random_batch, tiny_config, tiny_model
from tests.interop.tiny import random_variables
from tests.training.starting import forward, leaf, started

MOE = ("moe_layers", "moe")
MTP = ("mtp", "block", "moe")
SIGMOID = c.GroupedSigmoid(top_k=2, num_groups=2, top_groups=1, balance_weight=0.0, bias_update_rate=0.01)


def mixture(num_experts: int, router=SIGMOID, **changes) -> c.MixtureOfExperts:
    return c.MixtureOfExperts(num_experts=num_experts, expert_dim=16, router=router, **changes)


@pytest.mark.quick
def test_each_group_doubles_and_every_new_expert_has_a_parent():
    planned = growth.stages(c.Expansion(2, (5, 9), 3), mixture(8, c.GroupedSigmoid(num_groups=1, top_groups=1)))
    assert [(stage.step, stage.experts) for stage in planned] == [(5, 4), (9, 8)]
    assert planned[0].parent_E.tolist() == [0, 1, 0, 1, 4, 5, 6, 7]
    assert planned[1].parent_E.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    expansion, grouped = c.Expansion(4, (5,), 3), mixture(8)
    assert growth.first_experts(expansion, grouped).tolist() == [True, True, False, False] * 2
    assert growth.stages(expansion, grouped)[0].parent_E.tolist() == [0, 1, 0, 1, 4, 5, 4, 5]
    added, five = c.AddedExpert(layer=1, parent=2), mixture(5, dataclasses.replace(SIGMOID, num_groups=1))
    assert growth.stages(added, five)[0].parent_E.tolist() == [0, 1, 2, 3, 2]
    assert growth.first_experts(added, five).tolist() == [True] * 4 + [False]


@pytest.mark.quick
def test_a_new_bias_rises_to_its_parents_while_the_old_ones_are_balanced_alone():
    """Two stages, each with a ramp of four steps. The old biases move as if the new experts were not there yet."""
    moe = mixture(8, dataclasses.replace(SIGMOID, num_groups=1))
    expansion = c.Expansion(2, (3, 8), 4)
    random, inactive = np.random.default_rng(0), -np.inf
    bias_LE = jnp.asarray([[0.5, -0.25] + [inactive] * 6, [0.125, 0.0] + [inactive] * 6])
    seen, paths = 2, []
    for step in range(13):
        for stage in growth.stages(expansion, moe):
            if stage.step == step:
                start_L1 = bias_LE[:, :seen].min(axis=1, keepdims=True) - growth.BELOW
                bias_LE = jnp.where(stage.new_E, start_L1, bias_LE)
                paths.append([bias_LE[:, seen : 2 * seen] - bias_LE[:, :seen]])
        load_LE = jnp.where(jnp.isneginf(bias_LE), 0, random.integers(0, 9, (2, 8)).astype(np.float32))
        moved_LE = growth.update_bias(expansion, moe, bias_LE, load_LE, jnp.int32(step))
        rising = 3 <= step < 7 or 8 <= step < 12
        settled = update_selection_bias(bias_LE[:, :seen], load_LE[:, :seen], SIGMOID.bias_update_rate)
        np.testing.assert_array_equal(moved_LE[:, :seen], settled)
        if rising:
            paths[-1].append(moved_LE[:, seen : 2 * seen] - moved_LE[:, :seen])
        if step in (6, 11):  # the end of a ramp: exactly its parent's
            np.testing.assert_array_equal(moved_LE[:, seen : 2 * seen], moved_LE[:, :seen])
            seen *= 2
        bias_LE = moved_LE
        assert np.all(np.isneginf(bias_LE[:, 2 * seen :])) and not np.any(np.isnan(bias_LE))
    for path in paths:
        for before, after, left in zip(path, path[1:], (4, 3, 2, 1)):  # as far again each step, on the way to 0
            np.testing.assert_allclose(after, before * (left - 1) / left, atol=1e-6)
        assert len(path) == 5 and np.all(np.asarray(path[0]) <= -growth.BELOW)


def expansion_config(corpus, **train) -> c.Config:
    """Four experts, eight after three steps."""
    config = tiny_config(corpus, **train)
    config.model = tiny_model(moe=mixture(8))
    config.train.growth = c.Expansion(4, (3,), 4)
    return config.validate()


@pytest.fixture(scope="module")
def shared(corpus):
    config = expansion_config(corpus)
    return {"trainer": Trainer(config, make_mesh(config.mesh)), "dataset": load_dataset(config.data, 320)}


@pytest.fixture(scope="module")
def before(shared):
    """The state and a batch at the step of growth, on the host."""
    trainer = shared["trainer"]
    batch = random_batch(trainer.config)
    state = trainer.init(0)
    for seed in range(3):
        state, _ = trainer.step(state, random_batch(trainer.config, seed + 1))
    return jax.device_get(state), batch


def put(trainer, state):
    return jax.device_put(state, trainer.state_shardings)


@pytest.mark.parametrize("kind", ["feed_forward", pytest.param("deep", marks=pytest.mark.slow)])
def test_everything_that_counts_experts_is_found_and_copied(kind, corpus):
    """In multi-token prediction too, with a condition, and with the moments of the optimizer."""
    config = expansion_config(corpus)
    expert = c.FeedForward() if kind == "feed_forward" else c.DeepExpert(1, 2, 8)
    moe = mixture(8, condition=c.Condition(("words",), 4), expert=expert)
    config.model = tiny_model(moe=moe, mtp=c.MultiToken(1))
    trainer = Trainer(config.validate(), make_mesh(c.MeshConfig(fsdp=2, expert=2)))
    own = ["w_in", "w_out"]
    if kind == "deep":
        layer = ("w_qkv", "w_attention_out", "w_in", "w_out", "attention_norm/scale", "mlp_norm/scale")
        own = [f"deep/layer_0/{name}" for name in layer]
    own = [tuple(name.split("/")) for name in ("w_router", "w_condition", "bias", *own)]
    assert set(trainer.expert_axes) == {(*place, *name) for place in (MOE, MTP) for name in own}

    random = np.random.default_rng(0)  # moments are zero at first: any numbers will do
    state = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), trainer.state_shapes)
    state = dataclasses.replace(state, selection_bias=jax.device_get(trainer.init(0).selection_bias))
    (stage,) = growth.stages(config.train.growth, moe)
    grown = jax.device_get(trainer.grow(put(trainer, state), stage))
    new_E, parent_E = stage.new_E, stage.parent_E
    for old, new in ((state.params, grown.params), (state.opt_state, grown.opt_state)):
        for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(new)[0], jax.tree.leaves(old), strict=True):
            names = tuple(getattr(key, "key", "") for key in path)
            own = [axis for name, axis in trainer.expert_axes.items() if names[-len(name) :] == name]
            if not own:
                np.testing.assert_array_equal(x, y, err_msg=str(path))
                continue
            x, y = np.moveaxis(x, own[0], 0), np.moveaxis(y, own[0], 0)
            np.testing.assert_array_equal(x[~new_E], y[~new_E], err_msg=str(path))
            np.testing.assert_array_equal(x[new_E], y[parent_E[new_E]], err_msg=str(path))
    for place in (MOE, MTP):
        bias_LE = leaf(grown.selection_bias, *place, "bias")
        np.testing.assert_array_equal(bias_LE, np.where(new_E, -growth.BELOW, 0)[None].repeat(len(bias_LE), 0))


def test_growth_changes_no_logit_and_no_choice(shared, before):
    trainer, (state, batch) = shared["trainer"], before
    (stage,) = growth.stages(trainer.config.train.growth, trainer.config.model.moe)
    grown = jax.device_get(trainer.grow(put(trainer, state), stage))
    old, new = (leaf(s.selection_bias, *MOE, "bias") for s in (state, grown))
    np.testing.assert_array_equal(new[:, ~stage.new_E], old[:, ~stage.new_E])
    assert np.all(np.isneginf(old[:, stage.new_E])) and np.any(old[:, ~stage.new_E] != 0)
    start_L1 = old[:, ~stage.new_E].min(axis=1, keepdims=True) - growth.BELOW
    np.testing.assert_array_equal(new[:, stage.new_E], start_L1.repeat(4, axis=1))

    run = forward(trainer.config.model)
    outputs = [run(s.variables(), batch["tokens"]) for s in (state, grown)]
    assert_close(outputs[1].logits_BTV, outputs[0].logits_BTV, 1e-6, "logits")
    np.testing.assert_array_equal(outputs[1].routing.experts_BTK, outputs[0].routing.experts_BTK)
    assert not np.any(outputs[1].routing.load_E[:, stage.new_E])


def test_the_next_step_trains_the_old_parameters_as_without_growth(shared, before):
    """Gradients of the language-model loss (the change of Adam's first moment), updates and biases; the value of the
    balance loss, which weighs nothing here."""
    trainer, (state, batch) = shared["trainer"], before
    (stage,) = growth.stages(trainer.config.train.growth, trainer.config.model.moe)
    new_E = stage.new_E
    plain, plain_metrics = trainer.step(put(trainer, state), batch)
    grown, metrics = trainer.step(trainer.grow(put(trainer, state), stage), batch)
    for name in ("loss/lm", "loss/balance", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(plain_metrics[name]), rel=1e-5), name
    assert float(plain_metrics["router/active_experts"]) == 4 and float(metrics["router/active_experts"]) == 8
    assert float(metrics["router/max_over_mean"]) == pytest.approx(2 * float(plain_metrics["router/max_over_mean"]))
    for tree in (lambda s: s.params, lambda s: s.opt_state[1].mu, lambda s: s.selection_bias):
        for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(tree(grown))[0], jax.tree.leaves(tree(plain))):
            axis = trainer.expert_axes.get(tuple(key.key for key in path))
            if axis is not None:
                x, y = (np.moveaxis(np.asarray(z), axis, 0)[~new_E] for z in (x, y))
            assert_close(x, y, 1e-6, str(path))


@pytest.mark.quick
def test_the_balance_loss_keeps_its_value_but_not_its_gradient_and_the_z_loss_neither():
    """Copies are active at once. This is why growth has no z loss."""
    (stage,) = growth.stages(c.Expansion(4, (3,), 4), mixture(8))
    random = np.random.default_rng(0)
    logits_BTE = jnp.asarray(random.normal(size=(2, 9, 8)).astype(np.float32))[..., stage.parent_E]

    @jax.jit
    def terms(bias):
        bias_E, mask_BT = jnp.where(stage.new_E, bias, 0), jnp.ones((2, 9), bool)
        sums = lambda logits_BTE: route(SIGMOID, logits_BTE, bias_E, mask_BT).sums  # noqa: E731
        return sums(logits_BTE), jax.grad(lambda x: sums(x)["balance"])(logits_BTE)

    (before, old_BTE), (after, new_BTE) = terms(-jnp.inf), terms(-growth.BELOW)
    assert float(after["balance"]) == pytest.approx(float(before["balance"]), rel=1e-6)
    assert not np.any(old_BTE[..., stage.new_E]) and np.all(new_BTE[..., stage.new_E] != 0)
    assert float(after["z"]) > 1.2 * float(before["z"])


def test_a_run_grows_once_and_resumes_exactly(corpus, shared, tmp_path, capsys):
    """Stopped at the step of growth and in the ramp: the same bits as in one go."""
    straight = train(expansion_config(corpus, num_steps=9), tmp_path / "straight", **shared)
    assert capsys.readouterr().out.count("step 3: 4 -> 8 experts\n") == 1
    for last in (3, 5, 9):
        resumed = train(expansion_config(corpus, num_steps=last), tmp_path / "cut", **shared)
    assert capsys.readouterr().out.count("step 3: 4 -> 8 experts\n") == 1
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [read_metrics(tmp_path / name) for name in ("straight", "cut")]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]
    assert [x["router/active_experts"] for x in lines[0]] == [4, 4, 4, 8, 8, 8, 8, 8, 8]
    bias_LE = np.asarray(leaf(straight.state.selection_bias, *MOE, "bias"))
    assert np.all(np.abs(bias_LE) < 0.2)  # all have come up
    config = shared["trainer"].config
    output = forward(config.model)(straight.state.variables(), random_batch(config)["tokens"])
    assert np.any(output.routing.load_E[:, [2, 3, 6, 7]] > 0)  # and are chosen


def test_a_state_that_missed_its_stage_grows_late_and_a_grown_one_not_again(shared, before, capsys):
    trainer, (state, _) = shared["trainer"], before
    planned = growth.stages(trainer.config.train.growth, trainer.config.model.moe)
    same, left = _grow(trainer, put(trainer, state), 2, planned)
    assert left == planned and not growth.is_done(planned[0], same.selection_bias)
    late, left = _grow(trainer, same, 7, planned)
    assert left == [] and growth.is_done(planned[0], late.selection_bias)
    assert capsys.readouterr().out == "step 7: 4 -> 8 experts\n"
    again, _ = _grow(trainer, late, 7, planned)
    assert again is late and capsys.readouterr().out == ""


ONE_GROUP = dataclasses.replace(SIGMOID, num_groups=1)
WITH_Z = dataclasses.replace(SIGMOID, z_weight=0.1)


def added_config(corpus, experts: int = 4, **train) -> c.Config:
    """Two layers with experts. Five experts: the fifth is added, to the second of them."""
    config = tiny_config(corpus, **train)
    config.model = tiny_model(num_dense_layers=0, moe=mixture(experts, ONE_GROUP))
    config.model.attention.pattern = c.Full()
    if experts == 5:
        config.train.growth = c.AddedExpert(layer=1, parent=2, ramp_steps=4)
    return config.validate()


@pytest.fixture(scope="module")
def four_experts(corpus, tmp_path_factory):
    """Random weights with four experts and selection biases of both signs, as published: their folder, and they."""
    directory, model = tmp_path_factory.mktemp("four") / "hf", added_config(corpus).model
    variables = random_variables(model)
    save_hf(directory, model, variables)
    return directory, variables


def test_an_added_expert_changes_no_logit_and_is_trained_alone(four_experts, corpus, capsys):
    directory, old = four_experts
    config = added_config(corpus, 5)
    trainer, state, _ = started(directory, config)
    assert "step 0: 4 -> 5 experts in mixture-of-experts layer 1" in capsys.readouterr().out
    before, batch = jax.device_get(state), random_batch(config)
    bias_LE = leaf(before.selection_bias, *MOE, "bias")
    np.testing.assert_array_equal(bias_LE[:, :4], old["selection_bias"]["moe_layers"]["moe"]["bias"])
    assert np.isneginf(bias_LE[0, 4]) and bias_LE[1, 4] == bias_LE[1, :4].min() - growth.BELOW
    for name in ("w_in", "w_out"):
        x = leaf(before.params, *MOE, name)
        np.testing.assert_array_equal(x[1, 4], x[1, 2])
    expected = forward(added_config(corpus).model)(old, batch["tokens"]).logits_BTV
    assert_close(forward(config.model)(before.variables(), batch["tokens"]).logits_BTV, expected, 1e-6, "logits")

    losses = []
    for _ in range(20):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss/lm"]))
    assert min(losses[-3:]) < losses[0] - 0.01 and float(metrics["router/active_experts"]) == 4.5
    after = jax.device_get(state)
    trees = ((before.params, after.params), (before.opt_state[1].mu, after.opt_state[1].mu))
    for old_tree, new_tree in trees:
        for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(old_tree)[0], jax.tree.leaves(new_tree)):
            changed = np.asarray(x != y)
            names = tuple(key.key for key in path)
            if names in trainer.expert_axes:
                axis = trainer.expert_axes[names]
                assert np.mean(np.take(changed, 4, axis)[1]) > 0.5, path
                np.moveaxis(changed, axis, 1)[1, 4] = False
            assert not np.any(changed), path
    risen_LE = leaf(after.selection_bias, *MOE, "bias")
    np.testing.assert_array_equal(risen_LE[:, :4], bias_LE[:, :4])
    assert np.isneginf(risen_LE[0, 4]) and risen_LE[1, 4] == bias_LE[1, 2]


@pytest.mark.slow
def test_an_expansion_of_experts_in_groups_starts_from_weights_and_changes_no_logit(corpus, tmp_path):
    """Experts of a group stay together: the old ones lie elsewhere among more."""
    old, config = added_config(corpus).model, expansion_config(corpus)
    old.moe = mixture(4)
    config.model = dataclasses.replace(old, moe=mixture(8))
    variables = random_variables(old)
    save_hf(tmp_path / "hf", old, variables)
    trainer, state, _ = started(tmp_path / "hf", config.validate())
    batch, run = random_batch(config), forward(config.model)
    expected = forward(old)(variables, batch["tokens"]).logits_BTV
    before = jax.device_get(state)
    planned = growth.stages(config.train.growth, config.model.moe)
    grown = jax.device_get(_grow(trainer, state, 3, planned)[0])
    for at, active in ((before, [0, 1, 4, 5]), (grown, range(8))):
        assert np.flatnonzero(np.isfinite(leaf(at.selection_bias, *MOE, "bias")[0])).tolist() == list(active)
        assert_close(run(at.variables(), batch["tokens"]).logits_BTV, expected, 1e-6, "logits")


def test_sources_that_do_not_fit_growth_are_refused(four_experts, corpus, shared, tmp_path):
    directory, _ = four_experts

    def refuse(match, config):
        with pytest.raises(c.ConfigError, match=match):
            started(directory, config)

    four, six = added_config(corpus), added_config(corpus, 5)
    six.model = wider(six, 6)
    refuse("has 4 experts; config.train.growth=added_expert with model.moe.num_experts=6 begins with 5", six)
    refuse("config.model.moe.num_experts is 4, this run's 8", dataclasses.replace(four, model=wider(four, 8)))
    other = added_config(corpus, 5)
    other.model.num_layers = 4
    refuse("config.model.num_layers is 2, this run's 4", other)
    learned = added_config(corpus, 5)
    learned.model.attention.pattern = c.LearnedGlobal(8, 8, 2)
    refuse("has no params/.*gate.*, and config.train.growth=added_expert would not train it", learned)
    grown = dataclasses.replace(four, model=wider(four, 8), train=dataclasses.replace(four.train))
    grown.train.growth = c.Expansion(2, (3, 9), 4)
    refuse("has 4 experts; config.train.growth=expansion with model.moe.num_experts=8 begins with 2", grown)
    with pytest.raises(c.ConfigError, match="added_expert: adds to a trained model; give one .* as --init_from"):
        train(added_config(corpus, 5), tmp_path / "new", dataset=shared["dataset"])
    assert not (tmp_path / "new").exists()


def wider(config: c.Config, experts: int) -> c.ModelConfig:
    return dataclasses.replace(config.model, moe=mixture(experts, ONE_GROUP))


def test_inactive_experts_are_not_copied(four_experts, corpus, tmp_path):
    """What an unfinished expansion leaves behind."""
    config = added_config(corpus, 5)
    trainer = Trainer(config, make_mesh(config.mesh))
    wanted = flat(trainer.abstract_state().variables())
    source = open_source(str(four_experts[0]))
    load = source.load

    def with_inactive(asked):
        leaves = flat(load(asked))
        leaves["selection_bias/moe_layers/moe/bias"] = np.asarray([[0, 0, -np.inf, 0], [0, 0, 0, -np.inf]], np.float32)
        return nested(leaves)

    source = source._replace(load=with_inactive)
    fit_experts(source, config, trainer.expert_axes, wanted)
    config.train.growth = c.AddedExpert(layer=1, parent=3)
    with pytest.raises(c.ConfigError, match="inactive .*growth=AddedExpert.* another parent"):
        fit_experts(source, config, trainer.expert_axes, wanted)
    config.train.growth = c.Expansion(4, (3,), 4)
    with pytest.raises(c.ConfigError, match="inactive .*Expansion.* train that run to its last stage"):
        fit_experts(source, config, trainer.expert_axes, wanted)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("growing", "changes", "match"),
    [
        (c.Expansion(3, (5,)), {}, "initial_experts=3: doubled 1 times must give model.moe.num_experts=8"),
        (c.Expansion(2, (5, 9), 6), {}, r"steps=\(5, 9\): must be .* each at least ramp_steps=6 after the one before"),
        (c.Expansion(2, (5, 9), 4), {}, "initial_experts=2: must be at least 2 in each of router.num_groups=2"),
        (c.Expansion(4, (5,)), {"dispatch": c.CapacityDispatch()}, "needs model.moe.dispatch=grouped or dense"),
        (c.Expansion(4, (5,)), {"router": c.Softmax()}, "needs model.moe.router=grouped_sigmoid, given softmax"),
        (c.Expansion(4, (5,)), {"expert": c.FeedForward((8, 16))}, "needs experts of one width"),
        (c.Expansion(4, (5,)), {"router": WITH_Z}, "z_weight=0.1: must be 0 with train.growth=expansion: the z loss"),
        (c.Expansion(4, (16,), 5), {}, "ramp_steps=5: the last new expert is in full use at step 21, after .*=20"),
        (c.AddedExpert(ramp_steps=21), {"router": ONE_GROUP}, "ramp_steps=21: .* at step 21, after .*total_steps=20"),
        (c.AddedExpert(), {}, "num_groups=2: must be 1 with train.growth=added_expert"),
        (c.AddedExpert(layer=1), {"router": ONE_GROUP}, "growth.layer=1: must be between 0 and 0"),
        (c.AddedExpert(parent=7), {"router": ONE_GROUP}, "growth.parent=7: must be between 0 and 6"),
    ],
)
def test_growth_that_cannot_work_is_refused(growing, changes, match, corpus):
    config = tiny_config(corpus)
    config.model, config.train.growth = tiny_model(moe=dataclasses.replace(mixture(8), **changes)), growing
    with pytest.raises(c.ConfigError, match=match):
        config.validate()
    config.model = tiny_model(moe=mixture(8))
    config.train.growth, config.train.trainable = c.Expansion(4, (5,)), ("moe",)
    with pytest.raises(c.ConfigError, match="needs train.trainable to be empty"):
        config.validate()


@pytest.mark.slow
def test_a_run_with_an_added_expert_starts_from_a_run_and_resumes_exactly(corpus, shared, tmp_path, capsys):
    dataset = shared["dataset"]
    train(added_config(corpus, num_steps=4), tmp_path / "four", dataset=dataset)
    source = str(tmp_path / "four")
    straight = train(added_config(corpus, 5, num_steps=7), tmp_path / "straight", init_from=source, dataset=dataset)
    for last in (2, 5):
        train(added_config(corpus, 5, num_steps=last), tmp_path / "cut", init_from=source, dataset=dataset)
    resumed = train(added_config(corpus, 5, num_steps=7), tmp_path / "cut", dataset=dataset)  # the source is not needed
    assert capsys.readouterr().out.count("step 0: 4 -> 5 experts in mixture-of-experts layer 1\n") == 2
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    first, last = read_metrics(tmp_path / "straight")[0], read_metrics(tmp_path / "four")[-1]
    assert first["loss/lm"] < last["loss/lm"] + 0.5
