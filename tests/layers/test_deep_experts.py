"""Deep experts against a loop over experts and documents, and what must not change them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.layers.deep_experts import DeepExperts
from dsv3_jax.layers.inputs import CacheStep, make_packing
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.ops.patterns import Place
from tests.conftest import assert_close, tiny_model

B, T, K, E, D = 2, 10, 2, 4, 8
DEEP = c.DeepExpert(num_layers=2, num_heads=2, head_dim=4)
MOE = c.MixtureOfExperts(num_experts=E, expert_dim=6, router=c.Softmax(top_k=K), expert=DEEP)
CONFIG = c.ModelConfig(dim=D, attention=c.Attention(rope_theta=100.0))
DISPATCHES = {
    "dense": c.DenseDispatch(),
    "grouped": c.GroupedDispatch(),
    "ragged_dot": c.GroupedDispatch("ragged_dot"),
    "capacity": c.CapacityDispatch(),
}
# Row 0: documents of 4 and 3 tokens and 3 of padding; row 1: one document.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0], [1] * 10], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], range(10)], np.int32)


def packing(positions=POSITIONS, segments=SEGMENTS):
    return make_packing(CONFIG, Place(jnp.asarray(positions), jnp.asarray(segments)))


def _cases() -> dict[str, np.ndarray]:
    drawn = np.argsort(np.random.default_rng(0).random((B, T, E)), axis=-1)[..., :K].astype(np.int32)
    absent = np.where(drawn == 3, E, drawn)
    absent[1, 4] = E
    return {
        "some absent, one expert empty": absent,
        "random": drawn,
        "all on one pair": np.broadcast_to(np.array([2, 0], np.int32), (B, T, K)),
        "all absent": np.full((B, T, K), E, np.int32),
    }


CASES = _cases()


@pytest.fixture(scope="module")
def params():
    """Of DeepExperts, norms included, all far from where they start."""
    module = DeepExperts(CONFIG, MOE, DEEP)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((B, T, D)), jnp.zeros((B, T, K), jnp.int32), packing()))
    params = nn.unbox(init(jax.random.key(0)))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(2), 2)
    return jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (B, T, K, D))


def apply(dispatch, params, x_BTD, experts_BTK, config=CONFIG):
    moe = dataclasses.replace(MOE, dispatch=DISPATCHES[dispatch])
    return DeepExperts(config, moe, DEEP).apply({"params": params}, x_BTD, experts_BTK, packing())


@functools.partial(jax.jit, static_argnums=0)
def run(dispatch, params, x_BTD, experts_BTK, cotangent_BTKD):
    """Outputs, and gradients with respect to parameters and tokens."""

    def loss(params, x_BTD):
        y_BTKD = apply(dispatch, params, x_BTD, experts_BTK)
        return jnp.sum(y_BTKD * cotangent_BTKD), y_BTKD

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)


# The loop: one expert, one document at a time.


def norm(x_SD, scale_D):
    return x_SD / jnp.sqrt(jnp.mean(x_SD**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon) * scale_D


def rotate(x_SHN, position_S):
    half = x_SHN.shape[-1] // 2
    angle = position_S[:, None] * CONFIG.attention.rope_theta ** (-np.arange(half) / half)
    cos, sin, a, b = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None], x_SHN[..., :half], x_SHN[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def plain_stack(params, x_SD, position_S):
    """A plain Transformer on the S tokens of a document that chose an expert."""
    for index in range(DEEP.num_layers):
        p = params[f"layer_{index}"]
        qkv = jnp.einsum("SD,DxHN->xSHN", norm(x_SD, p["attention_norm"]["scale"]), p["w_qkv"])
        q, k, v = rotate(qkv[0], position_S), rotate(qkv[1], position_S), qkv[2]
        scores = jnp.einsum("SHN,RHN->HSR", q, k) / math.sqrt(DEEP.head_dim)
        scores = jnp.where(np.tril(np.ones((len(x_SD),) * 2, bool)), scores, -1e30)
        x_SD = x_SD + jnp.einsum("HSR,RHN,HND->SD", jax.nn.softmax(scores, axis=-1), v, p["w_attention_out"])
        gate, up = jnp.einsum("SD,DxF->xSF", norm(x_SD, p["mlp_norm"]["scale"]), p["w_in"])
        x_SD = x_SD + (jax.nn.silu(gate) * up) @ p["w_out"]
    return x_SD


@jax.jit
def added_and_gradients(params, x_SD, position_S, cotangent_SD):
    """What one expert's stack adds, and gradients with respect to its parameters and tokens."""
    added_SD, pull = jax.vjp(lambda params, x_SD: plain_stack(params, x_SD, position_S) - x_SD, params, x_SD)
    return added_SD, pull(cotangent_SD)


def by_loop(params, x_BTD, experts_BTK, cotangent_BTKD):
    """As `run`."""
    y_BTKD, dx_BTD = np.zeros((B, T, K, D)), np.zeros((B, T, D))
    dparams = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for b in range(B):
        for document in set(SEGMENTS[b]) - {0}:
            for expert in range(E):
                t, k = np.nonzero((experts_BTK[b] == expert) & (SEGMENTS[b] == document)[:, None])
                if len(t):
                    own = jax.tree.map(lambda leaf: leaf[expert], params)  # noqa: B023
                    added_SD, (down, dx_SD) = added_and_gradients(
                        own, x_BTD[b, t], POSITIONS[b, t], cotangent_BTKD[b, t, k]
                    )
                    y_BTKD[b, t, k] = added_SD
                    dx_BTD[b, t] += dx_SD
                    for total, share in zip(jax.tree.leaves(dparams), jax.tree.leaves(down), strict=True):
                        total[expert] += share
    return (dparams, dx_BTD), y_BTKD


@pytest.fixture(scope="module")
def expected(params, inputs):
    """Of the loop in the case that has everything; in the others of the oracle, which it proves."""
    loop_case = "some absent, one expert empty"
    others = [case for case in CASES if case != loop_case]
    results = {case: run("dense", params, inputs[0], CASES[case], inputs[1]) for case in others}
    return results | {loop_case: by_loop(params, inputs[0], CASES[loop_case], inputs[1])}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_loop_s(case, dispatch, params, inputs, expected):
    gradients, y_BTKD = run(dispatch, params, inputs[0], CASES[case], inputs[1])
    assert_close(y_BTKD, expected[case][1], 2e-5, "outputs")  # float32 through two layers, sums in another order
    assert_close(gradients, expected[case][0], 2e-5, "gradients")
    off_BTK = (CASES[case] == E) | (SEGMENTS == 0)[..., None]
    np.testing.assert_array_equal(np.asarray(y_BTKD)[off_BTK], 0)
    used = set(CASES[case][SEGMENTS > 0].reshape(-1).tolist())
    for leaf in jax.tree.leaves(gradients[0]):
        for expert in range(E):
            assert bool(np.any(np.asarray(leaf[expert]))) == (expert in used), "an expert without tokens learns nothing"
    np.testing.assert_array_equal(np.asarray(gradients[1])[SEGMENTS == 0], 0)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_later_tokens_and_choices_change_nothing_before(dispatch, params, inputs):
    cut, (x_BTD, cotangent) = 6, inputs
    other_x = x_BTD.at[:, cut:].add(1.0)
    other_experts = CASES["random"].copy()
    other_experts[:, cut:] = (other_experts[:, cut:] + 1) % E
    _, before = run(dispatch, params, x_BTD, CASES["random"], cotangent)
    _, after = run(dispatch, params, other_x, other_experts, cotangent)
    if dispatch == "dense":
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert_close(after[:, :cut], before[:, :cut], 2e-6)  # rows move among the groups, and vector lanes round otherwise
    assert np.all(np.any(np.asarray(before - after)[1, cut:], axis=(1, 2)))


def test_order_of_a_token_s_experts_only_permutes(params, inputs):
    x_BTD, cotangent = inputs
    _, y_BTKD = run("grouped", params, x_BTD, CASES["some absent, one expert empty"], cotangent)
    _, swapped = run("grouped", params, x_BTD, CASES["some absent, one expert empty"][..., ::-1], cotangent)
    np.testing.assert_allclose(y_BTKD, swapped[:, :, ::-1], rtol=1e-6, atol=1e-6)


def test_bfloat16_is_near_float32(params, inputs):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    x16 = inputs[0].astype(jnp.bfloat16)
    _, full = run("grouped", params, x16.astype(jnp.float32), CASES["random"], inputs[1])
    half = jax.jit(lambda params: apply("grouped", params, x16, CASES["random"], config))(params)
    assert half.dtype == jnp.bfloat16
    assert_close(half, full, 0.03)  # two layers of products rounded to 8 bits


@pytest.mark.quick
def test_a_cache_is_refused():
    step = CacheStep(jnp.ones((B,), jnp.int32), 16, 1, True)
    decoding = dataclasses.replace(packing(), cache_step=step)
    with pytest.raises(c.ConfigError, match=r"moe.expert=deep.*cache"):
        DeepExperts(CONFIG, MOE, DEEP).init(
            jax.random.key(0), jnp.zeros((B, T, D)), jnp.zeros((B, T, K), jnp.int32), decoding
        )


# In a model.


def model(dispatch: c.Dispatch, remat="none") -> c.ModelConfig:
    attention = c.Attention(projection=c.GroupedQuery(2, 1, 4), pattern=c.Full(), implementation="reference")
    expert = c.DeepExpert(num_layers=1, num_heads=2, head_dim=4)
    moe = c.MixtureOfExperts(4, 8, num_shared_experts=0, router=c.Softmax(), dispatch=dispatch, expert=expert)
    sizes = {"dim": 8, "num_layers": 1, "num_dense_layers": 0, "vocab_size": 64}
    return tiny_model(moe=moe, attention=attention, remat=remat, **sizes)


@pytest.fixture(scope="module")
def variables():
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(Transformer(model(c.DenseDispatch())).init)(jax.random.key(0), tokens))


TOKENS = np.random.default_rng(3).integers(0, 64, (2, T))


def model_gradients(variables, remat):
    @jax.jit
    def run(params):
        def loss(params):
            output = Transformer(model(c.GroupedDispatch(), remat)).apply(variables | {"params": params}, TOKENS)
            return jnp.mean(jax.nn.logsumexp(output.logits_BTV, axis=-1)), output.logits_BTV

        return jax.grad(loss, has_aux=True)(params)

    return run(variables["params"])


@pytest.mark.slow
def test_rematerialisation_changes_nothing_and_every_parameter_learns(variables):
    gradients, logits_BTV = model_gradients(variables, "none")
    again, logits_again_BTV = model_gradients(variables, "full")
    assert_close(logits_again_BTV, logits_BTV, 1e-6)
    assert_close(again, gradients, 2e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["moe_layers"]["moe"]["deep"]))


@pytest.mark.parametrize(
    "dispatch",
    [
        c.GroupedDispatch(),
        pytest.param(c.DenseDispatch(), marks=pytest.mark.slow),
        pytest.param(c.CapacityDispatch(0.5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_model_is_causal(dispatch, variables):
    cut, other = 7, TOKENS.copy()
    other[:, cut:] = (other[:, cut:] + 1) % 64
    logits = jax.jit(lambda tokens_BT: Transformer(model(dispatch)).apply(variables, tokens_BT).logits_BTV)
    before, after = logits(TOKENS), logits(other)
    assert_close(after[:, :cut], before[:, :cut], 2e-6)  # as above
    assert np.abs(np.asarray(after - before))[:, cut:].max() > 1e-3
