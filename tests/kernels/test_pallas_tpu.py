"""The TPU kernels, interpreted: steps, blocks, hard inputs, several devices. The test base that every implementation
runs is `test_windowed_attention.py`; compilation for TPUs is in `test_tpu_compilation.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention import api, windowed_attention
from dsv3_jax.kernels.windowed_attention.pallas_tpu import Blocks, tpu_attention
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import make_mesh
from tests.conftest import assert_close


def draw(seed, B, T, H, G, N, M, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(B, T, H, N), (B, T, G, N), (B, T, G, M)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def whole_row(B, T):
    return Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32))


def grids(function, *args) -> list[tuple[int, ...]]:
    """Of every kernel that a function calls."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(tuple(equation.params["grid_mapping"].grid))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.quick
def test_steps_of_the_grids_grow_with_the_window():
    """Forward, dq, and dk with dv; the last for each of two query heads of a key head."""

    def steps(pattern, T):
        args = [jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]

        def loss(q, k, v):
            out, _ = tpu_attention(
                q, k, v, whole_row(1, T), None, pattern, True, 0.1, None, 1, blocks=Blocks(512, 512, 128)
            )
            return jnp.sum(out.astype(jnp.float32))

        return grids(jax.grad(loss, argnums=(0, 1, 2)), *args)

    assert steps(c.Windowed(512), 8192) == [(1, 4, 31), (1, 4, 31), (1, 2, 62)]
    assert steps(c.Windowed(512), 16384) == [(1, 4, 63), (1, 4, 63), (1, 2, 126)]
    assert steps(c.Full(), 8192) == [(1, 4, 136), (1, 4, 136), (1, 2, 272)]


def attend(blocks, place, pattern, q, k, v):
    def total(q, k, v):
        out, lse = tpu_attention(q, k, v, place, None, pattern, True, 0.2, None, 4, blocks=blocks)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)


BLOCKS = [
    Blocks(128, 128, 128),
    Blocks(256, 128, 128),
    Blocks(128, 256, 128),
    Blocks(256, 256, 128),
    Blocks(256, 256, 256),
]


def test_blocks_of_any_size_give_the_same():
    q, k, v = draw(0, 1, 300, 4, 2, 24, 16)  # widths as latent attention has them: unequal
    place = Place(jnp.where(jnp.arange(300) < 170, jnp.arange(300), jnp.arange(300) - 170)[None],
                  jnp.where(jnp.arange(300) < 170, 1, 2)[None])  # fmt: skip
    results = [attend(blocks, place, c.Windowed(90), q, k, v) for blocks in BLOCKS]
    for result in results[1:]:
        assert_close(result, results[0], 1e-5)


HARD = {
    "large logits": lambda q, k, v: (100 * q, 100 * k, v),
    "all equal": lambda q, k, v: (jnp.ones_like(q), jnp.ones_like(k), v),
    "one key far above": lambda q, k, v: (q, k.at[:, 5].multiply(1e3), v),
    "random": lambda q, k, v: (q, k, v),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_errors_against_float64_are_those_of_xlas_attention(name, dtype):
    seed = int(np.random.SeedSequence().generate_state(1)[0] % 2**31)
    print("seed", seed)
    given = [x.astype(dtype) for x in HARD[name](*draw(seed, 1, 128, 2, 1, 16, 16))]
    settings = {"pattern": c.Windowed(40), "scale": 0.25}
    with jax.enable_x64(True):
        exact_inputs = [jnp.asarray(np.asarray(x, np.float64)) for x in given]
        exact = np.asarray(windowed_attention(*exact_inputs, **settings, implementation="reference")[0])
    errors = {}
    for implementation in ("pallas_tpu", "reference"):
        run = jax.jit(functools.partial(windowed_attention, **settings, implementation=implementation))
        out = np.asarray(run(*given)[0], np.float64)
        np.testing.assert_array_equal(out, np.asarray(run(*given)[0], np.float64))  # the same bits again
        errors[implementation] = np.sqrt(np.mean(np.square(out - exact))) / np.sqrt(np.mean(np.square(exact)))
    # Both round scores and products; which of two roundings is the luckier one is chance.
    assert errors["pallas_tpu"] <= 1.5 * errors["reference"] + np.finfo(np.float32).eps, errors


def test_rows_that_see_nothing_give_zeros_minus_infinity_and_no_gradient():
    q, k, v = draw(1, 1, 140, 2, 2, 8, 8)
    place = Place(jnp.arange(140)[None], jnp.where(jnp.arange(140) < 3, 1, 0)[None])
    gradients, (out, lse) = attend(BLOCKS[0], place, c.Full(), q, k, v)
    np.testing.assert_array_equal(out[:, 3:], 0)
    assert np.all(np.isneginf(lse[:, :, 3:])) and np.all(np.isfinite(lse[:, :, :3]))
    assert_close(out[:, 0], v[:, 0], 1e-6)  # one key
    for gradient in gradients:
        assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[:, 3:])


@pytest.mark.parametrize(("heads", "keys"), [(4, 2), (4, 1)])
def test_devices_work_on_their_own_part_and_give_what_one_gives(heads, keys):
    """One key head cannot be split over two devices: then the query heads are not either."""
    q, k, v = draw(2, 4, 128, heads, keys, 8, 8)
    settings = {"pattern": c.Windowed(30, (0,)), "scale": 0.3, "implementation": "pallas_tpu"}

    def total(q, k, v):
        out, lse = windowed_attention(q, k, v, **settings)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse), (out, lse)

    step = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    alone = jax.jit(step)(q, k, v)
    mesh = make_mesh(c.MeshConfig(fsdp=2, model=2))
    with jax.set_mesh(mesh):
        together = jax.jit(step)(q, k, v)
    assert_close(jax.device_get(together), jax.device_get(alone), 1e-5)
    spec = together[1][0].sharding.spec
    assert "fsdp" in spec[0] and (keys == 1 or "model" in spec[2]), spec


@pytest.mark.quick
def test_float16_is_refused_by_name_and_passed_over_by_default(monkeypatch):
    q, k, v = draw(0, 1, 8, 1, 1, 8, 8, jnp.float16)
    with pytest.raises(c.ConfigError, match="implementation='pallas_tpu': TPUs have no float16; use bfloat16"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, implementation="pallas_tpu")
    assert api.default_implementation(jnp.bfloat16) == "blocked"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert api.default_implementation(jnp.bfloat16) == "pallas_tpu"
    assert api.default_implementation(jnp.float16) == "blocked"
