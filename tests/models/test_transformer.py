"""The whole model: causality, packing, and settings that must not change the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.models.stack import unstack_layers
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.planning.flops import count_parameters
from tests.conftest import assert_close, tiny_model

PATTERNS = [
    c.Full(),
    c.Windowed(4, (0, 2)),
    c.Windowed(6, stride=3),
    c.Segmented(6),
    c.LearnedGlobal(4, 4, 2),
    c.Sparse(5, 2, 8),
    c.PerLayer((c.Windowed(5), c.Segmented(6, keys="all"))),
]
LEARNED = (c.LearnedGlobal, c.Sparse)
T = 24


def with_pattern(pattern: c.Pattern, **attention) -> c.ModelConfig:
    model = tiny_model()
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, pattern=pattern, **attention))


def init(config: c.ModelConfig):
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    if config.moe is not None:  # a bias that matters
        bias = 0.2 * jax.random.normal(
            jax.random.key(1), variables["selection_bias"]["moe_layers"]["moe"]["bias"].shape
        )
        variables["selection_bias"]["moe_layers"]["moe"]["bias"] = bias
    return variables


@pytest.fixture(scope="module")
def variables():
    return init(tiny_model())


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (2, T), 0, 320)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_changing_future_tokens_changes_nothing_before(pattern, variables, tokens):
    if isinstance(pattern, LEARNED):  # with parameters of their own
        variables = init(with_pattern(pattern))
    apply = jax.jit(Transformer(with_pattern(pattern)).apply)
    cut = 11
    changed = tokens.at[:, cut:].set((tokens[:, cut:] + 7) % 320)
    before, after = apply(variables, tokens), apply(variables, changed)
    np.testing.assert_array_equal(before.routing.experts_BTK[:, :, :cut], after.routing.experts_BTK[:, :, :cut])
    # not bit for bit: a token's row in its expert's matmul depends on how many tokens came before it in the batch
    assert_close(before.logits_BTV[:, :cut], after.logits_BTV[:, :cut], 1e-6)
    assert np.abs(np.asarray(before.logits_BTV - after.logits_BTV)[:, cut]).max() > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_documents_equal_documents_alone(pattern, variables, tokens):
    if isinstance(pattern, LEARNED):
        variables = init(with_pattern(pattern))
    apply = jax.jit(Transformer(with_pattern(pattern)).apply)
    cut = 10
    positions = jnp.tile(jnp.concatenate([jnp.arange(cut), jnp.arange(T - cut)]), (2, 1))
    segments = jnp.tile((jnp.arange(T) >= cut) + 1, (2, 1))
    packed = apply(variables, tokens, positions, segments).logits_BTV
    # float32: the rows' blocks are cut at other places
    assert_close(packed[:, :cut], apply(variables, tokens[:, :cut]).logits_BTV, 1e-5)
    assert_close(packed[:, cut:], apply(variables, tokens[:, cut:]).logits_BTV, 1e-5)


SAME = {
    "reference attention": with_pattern(c.Windowed(8, (0, 1)), implementation="reference"),
    "dense dispatch": tiny_model(moe=dataclasses.replace(tiny_model().moe, dispatch=c.DenseDispatch())),
    "ragged_dot": tiny_model(moe=dataclasses.replace(tiny_model().moe, dispatch=c.GroupedDispatch("ragged_dot"))),
    "scanned": tiny_model(unroll=False),
    "remat full": tiny_model(remat="full"),
    "remat dots, scanned": tiny_model(remat="dots", unroll=False),
}
SLOW = ("dense dispatch", "scanned", "remat full")  # the last entry has two of them, the invariants the third


def loss_and_gradients(config, variables, tokens):
    def loss(params):
        output = Transformer(config).apply({**variables, "params": params}, tokens)
        return jnp.mean(jax.nn.logsumexp(output.logits_BTV, -1) ** 2) + jnp.sum(output.routing.sums["balance"])

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SAME])
def test_settings_of_speed_and_memory_change_neither_loss_nor_gradients(name, variables, tokens):
    expected = loss_and_gradients(tiny_model(), variables, tokens)
    assert_close(loss_and_gradients(SAME[name], variables, tokens), expected, 2e-5, name)


CYCLE = with_pattern(c.PerLayer((c.Windowed(4), c.Windowed(6, (0,)), c.Full())))


@pytest.mark.slow
@pytest.mark.parametrize(("unroll", "remat"), [(False, "full"), (True, "full")])
def test_scanning_over_periods_of_patterns_is_layer_by_layer(unroll, remat, tokens):
    """Two dense layers, then seven: the cycle of three begins amid, and leaves a rest."""
    config = dataclasses.replace(CYCLE, num_layers=9, num_dense_layers=2)
    variables = init(config)

    def alone(params):
        unstacked = unstack_layers(config, {**variables, "params": params})
        output = Transformer(config).apply(unstacked, tokens)
        return jnp.mean(jax.nn.logsumexp(output.logits_BTV, -1) ** 2) + jnp.sum(output.routing.sums["balance"])

    expected = jax.jit(jax.value_and_grad(alone))(variables["params"])
    other = dataclasses.replace(config, unroll=unroll, remat=remat)
    assert_close(loss_and_gradients(other, variables, tokens), expected, 2e-5)


@pytest.mark.parametrize(
    "config",
    [
        tiny_model(attention=c.Attention(projection=c.GroupedQuery(4, 2, 8))),
        tiny_model(attention=c.Attention(projection=c.Latent(2, None, 8, 8, 8, 8))),
        tiny_model(moe=None, num_dense_layers=2, tie_embeddings=True),
        tiny_model(num_dense_layers=0, compute_dtype="bfloat16"),
    ],
    ids=["grouped query", "no query compression", "dense, tied", "all sparse, bf16"],
)
def test_other_shapes_run_with_finite_gradients_everywhere(config, tokens):
    variables = init(config)

    def loss(params):
        return jnp.mean(Transformer(config).apply({**variables, "params": params}, tokens).logits_BTV ** 2)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.all(np.isfinite(gradient)), path
        assert float(jnp.abs(gradient).max()) > 0, path


def test_a_token_outside_the_vocabulary_gives_nan_not_another_token(variables):
    logits = Transformer(tiny_model()).apply(variables, jnp.array([[3, 320]])).logits_BTV
    assert np.all(np.isnan(logits[0, 1]))


def test_weights_have_the_stated_spread():
    config = tiny_model(dim=128, dense_dim=256)
    params = init(config)["params"]
    dense = params["dense_layers"]["mlp"]
    assert float(jnp.std(dense["w_in"])) == pytest.approx(128**-0.5, rel=0.05)
    assert float(jnp.std(dense["w_out"])) == pytest.approx(256**-0.5 / 2, rel=0.05)  # two layers: / sqrt(4)
    assert float(jnp.std(params["head"])) == pytest.approx(1 / 128, rel=0.05)
    fixed = init(tiny_model(init_std=0.006))["params"]
    assert float(jnp.std(fixed["moe_layers"]["moe"]["w_in"])) == pytest.approx(0.006, rel=0.05)


@pytest.mark.quick
def test_the_published_model_has_671_billion_parameters_and_37_active():
    model = c.load("configs/dsv3_671b.py").model
    count, main = count_parameters(model), count_parameters(dataclasses.replace(model, mtp=None))
    assert round(main.total / 1e9) == 671
    assert int(count.active / 1e9) == 37 and count.active == main.active
    # "11.5B unique parameters" of the module in the release's own table: without its norms and projection.
    assert count.total - main.total == 11_610_067_968
    assert round(count_parameters(c.load("configs/base.py").model).total / 1e9) == 1
    assert count_parameters(c.load("configs/small.py").model).total == pytest.approx(10.5e6, rel=0.01)
