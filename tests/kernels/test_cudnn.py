"""The cuDNN route: XLA's implementation of the same call stands in for cuDNN's here. On a GPU: `test_on_gpu.py`."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention import api, windowed_attention
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import make_mesh
from tests.conftest import assert_close, fresh_key, tiny_model
from tests.kernels.attention_calls import call_of, place_of

pytestmark = pytest.mark.quick


def draw(T: int, heads: int, key_heads: int, N: int, M: int):
    shapes = (2, T, heads, N), (2, T, key_heads, N), (2, T, key_heads, M)
    return [jax.random.normal(fresh_key(i), shape) for i, shape in enumerate(shapes)]


def rows(*lengths: int) -> Place:
    """Rows of one document each, and padding after it."""
    places = [place_of(length, padding=max(lengths) - length) for length in lengths]
    return Place(*(jnp.concatenate(x) for x in zip(*(place[:2] for place in places), strict=True)))


@pytest.mark.parametrize(
    ("pattern", "causal", "widths"),
    [
        (c.Full(), True, (24, 16)),
        (c.Full(), False, (8, 8)),
        (c.Windowed(7), True, (10, 12)),
        (c.Windowed(1), True, (8, 8)),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_the_oracles(pattern, causal, widths):
    q, k, v = draw(40, 4, 2, *widths)

    def attend(implementation):
        def total(q, k, v):
            out, lse = windowed_attention(
                q, k, v, pattern=pattern, causal=causal, scale=0.4, place=rows(40, 29), max_segments=1,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(3 * out)), (out, lse[0], lse[1, :, :29], jnp.isneginf(lse))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    assert_close(attend("cudnn"), attend("reference"), 2e-5)  # float32: sums in another order


def test_devices_work_on_their_own_part_and_give_what_one_gives():
    """The log-sum-exp is not read, and a gradient through it not asked for, on several devices either."""
    q, k, v = draw(24, 4, 2, 8, 8)

    def total(q, k, v):
        out, _ = windowed_attention(q, k, v, pattern=c.Windowed(9), scale=0.4, implementation="cudnn")
        return jnp.sum(jnp.sin(out)), out

    step = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    alone = jax.jit(step)(q, k, v)
    with jax.set_mesh(make_mesh(c.MeshConfig(fsdp=2, model=2))):
        together = jax.jit(step)(q, k, v)
    assert_close(jax.device_get(together), jax.device_get(alone), 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_are_not_one_document_give_nan_not_a_wrong_result(causal):
    q, k, v = (x[:1] for x in draw(20, 1, 1, 8, 8))

    def attend(place, implementation="cudnn"):
        return windowed_attention(q, k, v, pattern=c.Full(), causal=causal, scale=1.0, place=place, max_segments=1,
                                  implementation=implementation)  # fmt: skip

    (out, lse), (expected, _) = attend(place_of(12, 8)), attend(place_of(12, 8), "reference")
    assert np.all(np.isnan(out[0, 12:])) and np.all(np.isnan(lse[0, :, 12:]))
    assert_close(out[0, :12], expected[0, :12], 2e-5)
    late = Place(jnp.maximum(jnp.arange(20) - 3, 0)[None], (jnp.arange(20) >= 3).astype(jnp.int32)[None])
    assert np.all(np.isnan(attend(late)[0][0, 3:]))


def test_what_it_cannot_run_is_refused_by_name(monkeypatch):
    x = jnp.ones((1, 4, 1, 8))
    for more, says in (
        ({"pattern": c.Windowed(2, (0,))}, "'cudnn': it knows the pattern full and, under causality, sliding windows"),
        ({"pattern": c.Full(), "softcap": 1.0}, "it has no soft-cap"),
        ({"pattern": c.Full(), "place": place_of(4)}, "one document a row, and max_segments=16: give 1"),
    ):
        with pytest.raises(c.ConfigError, match=says):
            windowed_attention(x, x, x, scale=1.0, implementation="cudnn", **more)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    assert "bfloat16 and float16, not float32" in (api.refusal("cudnn", call_of(jnp.float32)) or "")
    assert "192 wide" in (api.refusal("cudnn", call_of(jnp.bfloat16, 192, 128)) or "")
    assert api.refusal("cudnn", call_of(jnp.bfloat16)) is None
    for other in ("7.5", "gfx942"):
        monkeypatch.setattr(jax, "local_devices", lambda kind=other: [types.SimpleNamespace(compute_capability=kind)])
        assert f"8.0 and above; this GPU has {other}" in (api.refusal("cudnn", call_of(jnp.bfloat16)) or "")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="10.0")])
    assert api.refusal("cudnn", call_of(jnp.bfloat16, 192, 128)) is None
    assert api.default_implementation(call_of(jnp.bfloat16)) == "blocked", "it has not run there yet"


@pytest.mark.parametrize("of", [0, 1], ids=["queries", "keys"])
def test_a_gradient_through_the_log_sum_exp_is_refused(of):
    q, k, v = draw(8, 1, 1, 8, 8)

    def total(q, k):
        return jnp.sum(windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, implementation="cudnn")[1])

    with pytest.raises(c.ConfigError, match="gives no gradient through the log-sum-exp"):
        jax.grad(total, of)(q, k)


def test_on_a_gpu_it_is_cudnn_that_is_called(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(64, 4, 2, 24, 16))

    def total(q, k, v):
        attend = {"pattern": c.Windowed(17), "scale": 0.25, "implementation": "cudnn"}
        return jnp.sum(windowed_attention(q, k, v, **attend)[0])

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v)
    program = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", "")
    (forward,) = (line for line in program.splitlines() if "@__cudnn$fmhaSoftmax(" in line)
    (backward,) = (line for line in program.splitlines() if "@__cudnn$fmhaSoftmaxBackward(" in line)
    for line in (forward, backward):
        for says in ("sliding_window_length: 17,", "fmha_scale: 0.25,", "mask_type: CAUSAL,"):
            assert says in line, line


def test_rows_of_several_documents_are_refused_when_the_config_is_built():
    config = c.Config()
    config.model.attention.implementation = "cudnn"
    with pytest.raises(c.ConfigError, match="data.max_segments=16: must be 1 with model.attention.implementation"):
        config.validate()
    config.data.max_segments = 1
    config.validate()


def test_a_model_trains_and_decodes_as_with_the_oracle():
    def outputs(implementation):
        attention = dataclasses.replace(tiny_model().attention, pattern=c.Full(), implementation=implementation)
        model = Transformer(tiny_model(attention=attention, remat="full", unroll=False))
        tokens_BT = jax.random.randint(jax.random.key(0), (2, 12), 0, 320)
        variables = jax.jit(model.init)(jax.random.key(1), tokens_BT)

        def loss(params):
            logits_BTV = model.apply(variables | {"params": params}, tokens_BT).logits_BTV
            return jnp.sum(jnp.square(logits_BTV)), logits_BTV

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    assert_close(outputs("cudnn"), outputs("reference"), 1e-4)
