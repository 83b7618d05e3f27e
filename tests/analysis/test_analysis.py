"""Maps and statistics agree with what the model computes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax.analysis.attention import _layer_variables, attention_weights
from dsv3_jax.analysis.routing import expert_counts, routing_entropy
from dsv3_jax.layers.attention import Attention, make_packing, make_projection
from dsv3_jax.models.transformer import Transformer
from tests.conftest import assert_close, tiny_model


def test_weights_times_values_is_the_layer_and_counts_add_up():
    import jax

    config = tiny_model()
    tokens = jnp.arange(24)[None] * 7 % 320
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), tokens))
    weights = attention_weights(config, variables, tokens, layer=0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    params = _layer_variables(config, variables, 0)[0]["params"]["attention"]
    x = variables["params"]["embedding"][tokens]
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
    positions = jnp.arange(24)[None]
    packing = make_packing(config, positions, jnp.ones_like(positions))
    values = make_projection(config).apply({"params": params["projection"]}, x, packing.rope)[2]
    expected = Attention(config).apply({"params": params}, x, packing)
    out = jnp.einsum("BHTS,BSHM,HMD->BTD", weights, values, params["w_out"])
    assert_close(out, expected, 1e-5)
    assert attention_weights(config, variables, tokens, layer=1).shape == (1, 2, 24, 24)
    with pytest.raises(IndexError, match="layers 0 to 1"):
        attention_weights(config, variables, tokens, layer=2)

    routing = Transformer(config).apply(variables, tokens).routing
    np.testing.assert_array_equal(expert_counts(routing), np.asarray(routing.load_E))
    assert 0 < routing_entropy(routing)[0] <= np.log(8)
