"""Schedules, decay, width rule, moment dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax import config as c
from dsv3_jax.training.optimizer import make_optimizer, make_schedule

pytestmark = pytest.mark.quick
PARAMS = {
    "embedding": jnp.ones((4, 3)),
    "head": jnp.ones((3, 4)),
    "layers": {
        "norm": {"scale": jnp.ones((2, 3))},
        "mlp": {
            "w_in": jnp.ones((2, 3, 2, 5)),
            "gate": {"w_gate_in": jnp.ones((2, 3, 4)), "w_gate_out": jnp.ones((2, 4, 2))},
        },
        "moe": {"w_router": jnp.ones((2, 3, 6)), "w_condition": jnp.ones((2, 4, 6))},
    },
}


def one_update(dim=32, **settings):
    adamw = c.AdamW(learning_rate=0.1, base_dim=32, **settings)
    optimizer = make_optimizer(adamw, c.Cosine(total_steps=10, warmup_steps=0), dim)
    state = optimizer.init(PARAMS)
    gradients = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), PARAMS)
    updates, state = optimizer.update(gradients, state, PARAMS)
    return updates, state


def test_cosine_and_warmup_stable_decay_have_the_stated_values():
    cosine = make_schedule(c.Cosine(total_steps=100, warmup_steps=10, final_ratio=0.1), 2.0)
    assert float(cosine(0)) == pytest.approx(0.2)
    assert float(cosine(9)) == pytest.approx(2.0)
    assert float(cosine(55)) == pytest.approx(1.1)  # half way: (1 + 0.1) / 2 of the peak
    assert float(cosine(100)) == pytest.approx(0.2)
    stable = make_schedule(c.WarmupStableDecay(total_steps=100, warmup_steps=10, decay_steps=20, final_ratio=0.0), 2.0)
    assert [float(stable(s)) for s in (0, 10, 79, 90, 100)] == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.0])


def test_the_first_adam_step_is_the_rate_and_matrices_scale_with_width():
    for dim, matrix in ((32, 0.1), (128, 0.025)):
        updates, _ = one_update(dim=dim, weight_decay=0.0)
        assert float(updates["embedding"][0, 0]) == pytest.approx(-0.1, rel=1e-3)
        assert float(updates["layers"]["norm"]["scale"][0, 0]) == pytest.approx(-0.1, rel=1e-3)
        mlp, moe = updates["layers"]["mlp"], updates["layers"]["moe"]
        for update in (updates["head"], mlp["w_in"], mlp["gate"]["w_gate_in"], moe["w_router"]):
            np.testing.assert_allclose(update, -matrix, rtol=1e-3)
        for update in (mlp["gate"]["w_gate_out"], moe["w_condition"]):  # what they read does not widen with the model
            np.testing.assert_allclose(update, -0.1, rtol=1e-3)


def test_decay_spares_norms():
    plain, decayed = one_update(weight_decay=0.0)[0], one_update(weight_decay=0.5)[0]
    difference = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), plain, decayed)
    assert difference["layers"]["norm"]["scale"] == 0
    assert difference["layers"]["mlp"]["w_in"] == pytest.approx(0.05)
    assert difference["embedding"] == pytest.approx(0.05)


def test_gradients_are_clipped_to_the_norm():
    # A first Adam step does not depend on the gradient's size: look at the first moment.
    _, state = one_update(clip_norm=1e-4)
    norm = optax.global_norm(state[1].mu)
    assert float(norm) == pytest.approx(1e-4 * (1 - c.AdamW.beta1), rel=1e-4)


def test_moments_have_the_asked_dtypes_and_nearly_the_same_updates():
    exact, _ = one_update()
    updates, state = one_update(first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves((state[1].mu, state[1].nu))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
