"""For every router and kind of expert, with multi-token prediction on: what terms reach, what may not matter, how
biases move."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.interop.huggingface import flat
from dsv3_jax.models.transformer import Transformer, summed_loss
from dsv3_jax.ops.dispatch import capacity_of
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.loop import check_terms
from dsv3_jax.training.step import Trainer
from dsv3_jax.training.terms import loss_terms, term_weights
from tests.conftest import assert_close, random_batch, tiny_model

RATE = 1 / 64  # exact in binary: so are its steps
LOSSES = {"balance_weight": 0.1, "z_weight": 0.01, "bias_update_rate": RATE}
E, T = 8, 16
GROUPED, SOFTMAX = c.GroupedSigmoid(2, 4, 2, **LOSSES), c.Softmax(2, **LOSSES)


def mixture(router: c.Router = GROUPED, **settings) -> c.MixtureOfExperts:
    return c.MixtureOfExperts(E, 16, 1, router, **settings)


MIXTURES = {
    "grouped_sigmoid": mixture(),
    "softmax": mixture(SOFTMAX),
    "probability_mass": mixture(c.ProbabilityMass(1, 3, 2.0, 0.3, **LOSSES)),
    "condition": mixture(condition=c.Condition(("prose",), 4)),
    "deep": mixture(SOFTMAX, expert=c.DeepExpert(1, 2, 8)),
    "cross_expert": mixture(combination=c.CrossExpertAttention(2, 8)),
}
IN_TIME = ("grouped_sigmoid", "probability_mass")  # the others are slow tests
# New expert j is the old one PERMUTATION[j]; groups of two stay together.
PERMUTATION = np.array([5, 4, 0, 1, 7, 6, 2, 3])


def make_config(moe: c.MixtureOfExperts, microbatches: int = 1, **model) -> c.Config:
    """One dense layer, one with experts, one module of multi-token prediction with experts."""
    return c.Config(
        model=tiny_model(moe=moe, mtp=c.MultiToken(1, weight=0.5), **model),
        data=c.DataConfig(tokenizer=c.BpeTokenizer(300), sequence_length=T),
        train=c.TrainConfig(batch_size=4, microbatches=microbatches, optimizer=c.AdamW(base_dim=32)),
    ).validate()


class Seen(NamedTuple):
    """values of each loss term; all sums; experts_LBTK and real_LBT of the layer with experts and of the module's."""

    values: dict[str, Any]
    sums: dict[str, Any]
    experts_LBTK: Any
    real_LBT: Any

    def loads(self) -> np.ndarray:
        """load_LE, counted one by one."""
        pairs = zip(np.asarray(self.experts_LBTK), np.asarray(self.real_LBT), strict=True)
        return np.stack([np.bincount(experts[real].ravel(), minlength=E + 1)[:E] for experts, real in pairs])


def make_terms(config: c.Config) -> Callable[..., tuple[Any, Seen]]:
    """(variables, batch, weights) -> gradients of Σ weight · term, and what was seen; of one program."""

    @jax.jit
    def run(variables, batch, weights):
        def loss(params):
            lm, output = summed_loss(config, variables | {"params": params}, batch, predict_ahead=True)
            sums = {"lm": lm} | output.sums
            values = {name: sums[name] / term.count for name, term in loss_terms(config, batch, 0).items()}
            experts = jnp.concatenate([output.routing.experts_BTK, output.prediction.routing.experts_BTK])
            real = jnp.concatenate([batch["segment_ids"][None], output.prediction.segment_ids_kBT]) > 0
            return sum(weights[name] * values[name] for name in weights), Seen(values, sums, experts, real)

        return jax.grad(loss, has_aux=True)(variables["params"])

    return lambda variables, batch, *names: run(
        variables, batch, {name: float(name in names) for name in loss_terms(config, batch, 0)}
    )


@dataclasses.dataclass
class Case:
    """A mixture: its config, a trainer, a state on the host whose biases matter, a packed batch, and `make_terms`."""

    config: c.Config
    trainer: Trainer
    state: Any
    batch: dict[str, np.ndarray]
    terms: Callable[..., tuple[Any, Seen]]

    @property
    def variables(self) -> dict[str, Any]:
        return self.state.variables()

    def step(self, state: Any, batch: dict[str, np.ndarray]) -> Any:
        """State and metrics on the host; the given state stays."""
        return jax.device_get(self.trainer.step(jax.device_put(state, self.trainer.state_shardings), batch))


def perturbed(selection_bias: Any, scale: float = 0.2) -> Any:
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: (x + scale * random.normal(size=x.shape)).astype(np.float32) if x.ndim == 2 else x, selection_bias
    )


def away_from_zero(params: Any) -> Any:
    """Conditions start at zero, where nothing reaches what comes before them."""
    random = np.random.default_rng(4)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0.5 * random.normal(size=x.shape).astype(x.dtype) if path[-1].key == "w_condition" else x,
        params,
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in IN_TIME else pytest.mark.slow) for name in MIXTURES],
)
def case(request) -> Case:
    config = make_config(MIXTURES[request.param])
    trainer = Trainer(config, make_mesh(config.mesh))
    state = jax.device_get(trainer.init(0))
    state = state.replace(params=away_from_zero(state.params), selection_bias=perturbed(state.selection_bias))
    return Case(config, trainer, state, random_batch(config), make_terms(config))


@pytest.fixture(scope="module")
def stepped(case):
    """State and metrics after one step."""
    return case.step(case.state, case.batch)


def reached(gradients: Any) -> set[str]:
    return {path for path, gradient in flat(gradients).items() if np.any(np.asarray(gradient) != 0)}


def inside_module_mixture(path: str) -> bool:
    return path.startswith("mtp/block/moe/")


ROUTING = ("w_router", "w_condition")
# What comes after the term in the model, and cannot be reached by its gradient.
BEYOND = {
    "lm": lambda path: path.startswith("mtp/"),
    "mtp_1": lambda path: False,
    "balance": lambda path: inside_module_mixture(path) and not path.endswith(ROUTING),
    "activation": lambda path: inside_module_mixture(path) and "/gate/" not in path,
}
BEYOND["z"] = BEYOND["balance"]


def check_reach(config: c.Config, terms: Callable[..., Any], variables: Any, batch: Any, names: set[str]) -> None:
    assert set(loss_terms(config, batch, 0)) == names
    for name in names:
        gradients, seen = terms(variables, batch, name)
        value = float(seen.values[name])
        assert np.isfinite(value) and value > 0, name
        assert all(np.all(np.isfinite(gradient)) for gradient in jax.tree.leaves(gradients)), name
        after = {"head", "mtp/final_norm/scale"} if name not in ("lm", "mtp_1") else set()
        expected = {path for path in flat(variables["params"]) if path not in after and not BEYOND[name](path)}
        assert reached(gradients) == expected, name


def test_every_term_is_on_and_reaches_what_comes_before_it_and_nothing_else(case):
    check_reach(case.config, case.terms, case.variables, case.batch, {"lm", "mtp_1", "balance", "z"})


def test_the_unit_gates_term_reaches_gates_and_what_comes_before_them():
    config = make_config(mixture(), unit_gate=c.UnitGate(blocks=4, gate_dim=4))
    trainer = Trainer(config, make_mesh(config.mesh))
    variables = jax.device_get(trainer.init(0)).variables()
    names = {"lm", "mtp_1", "balance", "z", "activation"}
    check_reach(config, make_terms(config), variables, random_batch(config), names)


def test_packed_documents_and_documents_alone_give_the_same_losses_loads_and_gradients(case):
    """Of what is summed over tokens; the balance loss is of a sequence, which differs."""
    random, lengths = np.random.default_rng(0), ((7, 9), (5, 8))
    empty = {name: np.zeros_like(x) for name, x in case.batch.items()}
    packed, alone = (jax.tree.map(np.copy, empty) for _ in range(2))
    for row, pair in enumerate(lengths):
        for number, length in enumerate(pair):
            tokens = random.integers(0, 320, length + 1)
            start = number * pair[0]
            for batch, at, first, segment in ((packed, row, start, number + 1), (alone, 2 * row + number, 0, 1)):
                batch["tokens"][at, first : first + length] = tokens[:-1]
                batch["targets"][at, first : first + length] = tokens[1:]
                batch["positions"][at, first:] = np.arange(T - first)
                batch["segment_ids"][at, first : first + length] = segment
    names = ("lm", "mtp_1", "z")
    (actual, together), (expected, apart) = (case.terms(case.variables, batch, *names) for batch in (packed, alone))
    assert_close({name: together.sums[name] for name in names}, {name: apart.sums[name] for name in names}, 1e-6)
    np.testing.assert_array_equal(together.loads(), apart.loads())
    assert_close(actual, expected, 2e-5)  # float32 sums in another order


def test_an_expert_without_tokens_has_exactly_no_gradient(case):
    biases = jax.tree.map(lambda x: np.copy(x), case.state.selection_bias)
    for path, bias in flat(biases).items():
        if path.endswith("bias"):
            bias[:, 0] = -1e9
    gradients, seen = case.terms(case.variables | {"selection_bias": biases}, case.batch, "lm", "mtp_1", "balance", "z")
    assert np.all(seen.loads()[:, 0] == 0) and np.all(seen.loads()[:, 2:].sum(axis=1) > 0)
    weights = [path for path in map("/".join, case.trainer.expert_axes) if not path.endswith((*ROUTING, "bias"))]
    assert len(weights) >= 4  # two of the layer, two of the module; the balance loss moves routers of all experts
    for path in weights:
        gradient = np.asarray(flat(gradients)[path])
        assert np.all(gradient[:, 0] == 0) and np.any(gradient[:, 2:] != 0), path


def moved_biases(case: Case, move: Callable[[np.ndarray], np.ndarray]) -> Seen:
    biases = jax.tree.map(lambda x: move(x) if x.ndim == 2 else x, case.state.selection_bias)
    return case.terms(case.variables | {"selection_bias": biases}, case.batch, "lm")[1]


def test_a_shift_of_every_bias_changes_no_choice(case):
    seen = case.terms(case.variables, case.batch, "lm")[1]
    shifted, without = moved_biases(case, lambda x: x + np.float32(0.5)), moved_biases(case, np.zeros_like)
    np.testing.assert_array_equal(shifted.experts_LBTK, seen.experts_LBTK)
    assert_close(shifted.values, seen.values, 1e-6)
    assert np.any(np.asarray(without.experts_LBTK) != np.asarray(seen.experts_LBTK))  # other biases do


def test_experts_in_another_order_are_the_same_model(case):
    axis_of = case.trainer.expert_axes

    def permute(tree):
        def one(path, x):
            axis = axis_of.get(tuple(key.key for key in path))
            return x if axis is None else jnp.take(x, PERMUTATION, axis=axis)

        return jax.tree_util.tree_map_with_path(one, tree)

    assert {path[-1] for path in axis_of} >= {"w_router", "w_in", "w_out", "bias"}
    variables = {name: permute(tree) for name, tree in case.variables.items()}
    names = tuple(loss_terms(case.config, case.batch, 0))
    expected, before = case.terms(case.variables, case.batch, *names)
    gradients, after = case.terms(variables, case.batch, *names)
    assert_close(after.values, before.values, 1e-6)
    np.testing.assert_array_equal(after.loads(), before.loads()[:, PERMUTATION])
    assert_close(gradients, permute(expected), 2e-5)  # float32 sums in another order


def test_biases_move_by_the_rate_towards_balance_in_every_layer_and_the_mass_to_its_mean(case, stepped):
    state, _ = stepped
    seen = case.terms(case.variables, case.batch, "lm")[1]
    load_LE, before, after = seen.loads(), flat(case.state.selection_bias), flat(state.selection_bias)
    groups = ("moe_layers/moe", "mtp/block/moe")
    for load_E, tokens, group in zip(load_LE, np.asarray(seen.real_LBT).sum(axis=(1, 2)), groups, strict=True):
        direction_E = np.sign(load_E.mean() - load_E).astype(np.float32)
        assert {-1, 1} <= set(direction_E)
        path = f"{group}/bias"
        np.testing.assert_array_equal(after[path][0], before[path][0] + np.float32(RATE) * direction_E)
        if isinstance(router := case.config.model.moe.router, c.ProbabilityMass):
            miss = router.target_k - load_E.sum() / tokens
            expected = before[f"{group}/mass"][0] + router.mass_update_rate * miss
            assert after[f"{group}/mass"][0] == pytest.approx(expected, rel=1e-6) and abs(miss) > 1e-3


def test_documents_too_short_for_a_module_stop_nothing_and_move_nothing_of_it(case):
    segments = np.broadcast_to(np.arange(1, T + 1, dtype=np.int32), (4, T))
    state, metrics = case.step(case.state, case.batch | {"segment_ids": segments, "positions": np.zeros_like(segments)})
    metrics = {name: float(value) for name, value in metrics.items()}
    assert metrics["loss/mtp_1"] == metrics["tokens/mtp_1"] == 0
    check_terms(1, metrics, term_weights(case.config, 0))
    before, after = flat(case.state.selection_bias), flat(state.selection_bias)
    for path in before:
        assert np.array_equal(before[path], after[path]) == path.startswith("mtp/"), path


def test_a_run_that_is_saved_and_restored_goes_on_bit_for_bit(case, stepped, tmp_path):
    first, _ = stepped
    checkpoints = Checkpoints(tmp_path, 1)
    iterator = iter(grain.MapDataset.source([0, 1]).to_iter_dataset())
    checkpoints.save(jax.device_put(first, case.trainer.state_shardings), iterator)
    restored = checkpoints.restore(case.trainer, iterator, case.config.train.seed)
    checkpoints.close()
    again, uninterrupted = (case.step(state, case.batch) for state in (jax.device_get(restored), first))
    for path, value in flat({"state": again[0].variables(), "metrics": again[1]}).items():
        other = flat({"state": uninterrupted[0].variables(), "metrics": uninterrupted[1]})[path]
        np.testing.assert_array_equal(value, other, err_msg=path)
    assert np.any(
        flat(again[0].selection_bias)["mtp/block/moe/bias"] != flat(first.selection_bias)["mtp/block/moe/bias"]
    )


VARIANTS = {
    "full, scanned, 2 micro-batches": {"remat": "full", "unroll": False, "microbatches": 2},
    "dots, 4 micro-batches": {"remat": "dots", "microbatches": 4},
}


# One router stands for the others where time is short.
QUICKER = [pytest.param(name, marks=() if name == "probability_mass" else pytest.mark.slow) for name in MIXTURES]


@pytest.mark.parametrize("name", [next(iter(VARIANTS)), pytest.param(list(VARIANTS)[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", QUICKER, indirect=True)
def test_remat_scanning_and_microbatches_change_neither_loss_nor_gradients(case, stepped, name):
    check_variant(case, stepped, case.config.model.moe, name)


def check_variant(case: Case, stepped: Any, moe: c.MixtureOfExperts, name: str) -> None:
    trainer = Trainer(make_config(moe, **VARIANTS[name]), case.trainer.mesh)
    state, metrics = trainer.step(jax.device_put(case.state, trainer.state_shardings), case.batch)
    # float32 sums in another order; Adam's first moment after one step is the gradient
    assert_close(metrics, stepped[1], 2e-5)
    assert_close(state.opt_state[1].mu, stepped[0].opt_state[1].mu, 2e-5)
    for a, b in zip(jax.tree.leaves(state.selection_bias), jax.tree.leaves(stepped[0].selection_bias), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", ["grouped_sigmoid"], indirect=True)
def test_remat_scanning_and_microbatches_change_no_draw(case, stepped, name):
    """With router noise and expert dropout: an expert that fell out in one program falls out in the other."""
    moe = mixture(router_noise=0.5, expert_dropout=0.3)
    trainer = Trainer(make_config(moe), case.trainer.mesh)
    drawn = jax.device_get(trainer.step(jax.device_put(case.state, trainer.state_shardings), case.batch))
    assert float(drawn[1]["loss/lm"]) != float(stepped[1]["loss/lm"])
    check_variant(case, drawn, moe, name)


def test_nothing_is_dropped_but_by_capacity_and_drops_are_counted(case, stepped):
    assert stepped[1]["router/dropped"] == 0
    config = make_config(dataclasses.replace(case.config.model.moe, dispatch=c.CapacityDispatch(0.75)))
    batch = case.batch
    output = jax.jit(lambda variables: Transformer(config.model).apply(
        variables, batch["tokens"], batch["positions"], batch["segment_ids"], predict_ahead=True, return_logits=False
    ))(case.variables)  # fmt: skip
    room, dropped = capacity_of(0.75, T, config.model.moe.router.top_k, E), 0
    layers = zip(
        (*output.routing.experts_BTK, *output.prediction.routing.experts_BTK),
        (batch["segment_ids"], *output.prediction.segment_ids_kBT),
        strict=True,
    )
    for experts_BTK, segment_BT in layers:
        for experts_TK, segment_T in zip(np.asarray(experts_BTK), np.asarray(segment_BT), strict=True):
            taken = np.bincount(experts_TK[segment_T > 0].ravel(), minlength=E + 1)[:E]
            dropped += int(np.maximum(taken - room, 0).sum())
    assert float(output.sums["dropped"]) == dropped > 0
