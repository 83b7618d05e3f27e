"""Maps and statistics agree with what the model computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.analysis.attention import attention_weights
from dsv3_jax.analysis.routing import entropy_share, expert_counts
from dsv3_jax.layers.attention import Attention
from dsv3_jax.layers.inputs import make_packing
from dsv3_jax.layers.projections import make_projection
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.ops.patterns import Place
from tests.conftest import assert_close, tiny_model

TOKENS = jnp.arange(24)[None] * 7 % 320


def with_attention(**changes) -> c.ModelConfig:
    model = tiny_model()
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **changes))


@pytest.mark.parametrize(
    "config",
    [
        tiny_model(),
        with_attention(pattern=c.LearnedGlobal(4, 4, 2), sinks=True, softcap=2.0),
        pytest.param(with_attention(pattern=c.Sparse(5, 2, 8), rope_scaling=c.Yarn(4.0, 8)), marks=pytest.mark.slow),
    ],
    ids=["windowed", "learned, sinks, soft cap", "sparse, YaRN"],
)
def test_weights_times_values_is_the_layer(config):
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS))
    weights = attention_weights(config, variables, TOKENS, layer=0)
    if not config.attention.sinks:
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    params = jax.tree.map(lambda x: x[0], variables["params"]["dense_layers"]["attention"])
    x = variables["params"]["embedding"][TOKENS]
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
    packing = make_packing(config, Place(jnp.arange(24)[None], jnp.ones((1, 24), jnp.int32)))
    values = make_projection(config).apply({"params": params["projection"]}, x, packing.rope).v_BTGM
    expected, _, _ = Attention(config, config.attention.pattern).apply({"params": params}, x, packing)
    out = jnp.einsum("BHTS,BSHM,HMD->BTD", weights, values, params["w_out"])
    assert_close(out, expected, 1e-5)
    assert attention_weights(config, variables, TOKENS, layer=1).shape == (1, 2, 24, 24)
    with pytest.raises(IndexError, match="layers 0 to 1"):
        attention_weights(config, variables, TOKENS, layer=2)


def test_counts_add_up():
    config = tiny_model()
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS))
    routing = Transformer(config).apply(variables, TOKENS).routing
    np.testing.assert_array_equal(expert_counts(routing), np.asarray(routing.load_E))
    assert 0 < entropy_share(expert_counts(routing))[0] <= 1
