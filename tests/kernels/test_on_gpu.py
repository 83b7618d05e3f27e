"""The Mosaic GPU kernels on a Hopper GPU: `make test-gpu`. Elsewhere they are interpreted and compiled, not run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.decode_attention import decode_attention
from dsv3_jax.kernels.grouped_matmul import grouped_experts, pick_matmul, quantized
from dsv3_jax.kernels.windowed_attention import windowed_attention
from dsv3_jax.ops.patterns import Place
from tests.conftest import fresh_key
from tests.kernels.attention_calls import place_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="it takes a GPU: make test-gpu"),
]


def error(actual: jax.Array, exact: jax.Array) -> float:
    """‖actual − exact‖ / ‖exact‖; NaN anywhere gives NaN, which is at most nothing."""
    a, e = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30))


def three_ways(run, arrays, fast: str, peer: str = "reference", finite=None, repeats: bool = True):
    """run(arrays, implementation) by `fast`, twice, by `peer` in the same dtype, and by the oracle in float64.

    finite: what the other two are given, where `arrays` hold what must not matter. repeats: whether both runs must be
    equal bit for bit.
    """
    given = [(arrays, fast), (arrays, fast), (finite or arrays, peer)]
    first, again, other = (
        jax.device_get(jax.jit(functools.partial(run, implementation=name))(*arrays)) for arrays, name in given
    )
    if repeats:  # nothing depends on timing
        jax.tree.map(np.testing.assert_array_equal, first, again)
    with jax.enable_x64(True):
        exact = jax.device_get(run(*(x.astype(jnp.float64) for x in finite or arrays), implementation="reference"))
    return first, other, exact


def assert_as_exact_as_the_oracle(names, actual, oracle, exact, at_least: float) -> None:
    """Errors of at most 1.5 times the oracle's in the same dtype; `at_least` where that is nearly exact."""
    for name, a, o, e in zip(names, *(jax.tree.leaves(x) for x in (actual, oracle, exact)), strict=True):
        assert error(a, e) <= max(1.5 * error(o, e), at_least), (name, error(a, e), error(o, e))


# pattern, causal, soft-cap, documents, padding, query heads, key heads, widths, dtype
ATTENTION = [
    (c.Full(), True, None, (512,), 0, 2, 2, (128, 128), jnp.bfloat16),
    (c.Full(), False, None, (300, 120), 9, 4, 2, (64, 64), jnp.bfloat16),
    (c.Full(), True, None, (1000,), 0, 4, 1, (192, 128), jnp.bfloat16),
    (c.Full(), True, 3.0, (700,), 3, 2, 2, (192, 128), jnp.float16),
    (c.Windowed(200), True, None, (230, 150, 400), 20, 8, 2, (128, 128), jnp.bfloat16),
    (c.Windowed(140), False, 5.0, (900,), 1, 2, 1, (128, 128), jnp.bfloat16),
    (c.Windowed(64), True, None, (2000,), 0, 2, 2, (72, 40), jnp.float16),
    (c.Windowed(300, global_positions=(0, 5)), True, None, (1500,), 30, 4, 2, (128, 128), jnp.bfloat16),
    (c.Windowed(256, stride=64), True, None, (1100,), 0, 2, 2, (128, 128), jnp.bfloat16),
    (c.Segmented(100), True, None, (1030,), 0, 2, 2, (128, 64), jnp.bfloat16),
    (c.RuntimeWindowed(400, (0,)), True, None, (600, 600), 0, 2, 2, (128, 128), jnp.bfloat16),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_and_its_gradients_are_the_oracles(case):
    pattern, causal, softcap, lengths, padding, heads, key_heads, (N, M), dtype = case
    place, T = place_of(*lengths, padding=padding), sum(lengths) + padding
    if isinstance(pattern, c.RuntimeWindowed):
        place = place._replace(window_BT=jax.random.randint(fresh_key(9), (1, T), 1, pattern.window + 1))
    shapes = (1, T, heads, N), (1, T, key_heads, N), (1, T, key_heads, M), (1, T, heads, M)
    q, k, v, weight = (jax.random.normal(fresh_key(i), shape, dtype) for i, shape in enumerate(shapes))

    def run(q, k, v, weight, implementation):
        def total(q, k, v):
            out, lse = windowed_attention(
                q, k, v, pattern=pattern, scale=2 * N**-0.5, causal=causal, softcap=softcap,
                place=Place(*place), max_segments=4, implementation=implementation,
            )  # fmt: skip
            finite = jnp.where(jnp.isfinite(lse), lse, 0)
            total = jnp.sum((out * weight).astype(lse.dtype)) + jnp.sum(jnp.cos(finite))
            return total, (out, finite, jnp.isneginf(lse))

        gradients, results = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return *results, *gradients

    results = three_ways(run, (q, k, v, weight), "pallas_gpu")
    names = "out", "log-sum-exp", "sees nothing", "dq", "dk", "dv"
    assert_as_exact_as_the_oracle(names, *results, at_least=1e-5)


@pytest.mark.parametrize(("pattern", "causal"), [(c.Full(), True), (c.Full(), False), (c.Windowed(100), True)], ids=str)
def test_cudnns_attention_and_its_gradients_are_the_oracles(pattern, causal):
    """A whole row, one with padding, one that is padding alone; values 60 wide."""
    shapes = (3, 600, 4, 128), (3, 600, 2, 128), (3, 600, 2, 60), (3, 600, 4, 60)
    q, k, v, weight = (jax.random.normal(fresh_key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    rows = (place_of(length, padding=600 - length)[:2] for length in (600, 450, 0))
    place = Place(*(jnp.concatenate(x) for x in zip(*rows, strict=True)))

    def run(q, k, v, weight, implementation):
        def attend(q, k, v):
            return windowed_attention(
                q, k, v, pattern=pattern, causal=causal, scale=0.1, place=place, max_segments=1,
                implementation=implementation,
            )  # fmt: skip

        out, back, lse = jax.vjp(attend, q, k, v, has_aux=True)
        return jnp.where(jnp.isfinite(lse), lse, 0), jnp.isneginf(lse), out, *back(weight.astype(out.dtype))

    results = three_ways(run, (q, k, v, weight), "cudnn", repeats=False)  # its additions may come in any order
    first, *names = "log-sum-exp", "sees nothing", "out", "dq", "dk", "dv"
    assert error(results[0][0], results[2][0]) < 2**-8, f"{first}, rounded to bfloat16"
    assert_as_exact_as_the_oracle(names, *(result[1:] for result in results), at_least=1e-5)


@pytest.mark.parametrize("kind", ["large logits", "all equal", "one key"])
def test_attention_of_hard_inputs_is_as_exact_as_xlas(kind):
    T, window = 256, 1 if kind == "one key" else None
    q, k, v, weight = (jax.random.normal(fresh_key(i), (1, T, 2, 128), jnp.bfloat16) for i in range(4))
    if kind == "large logits":
        q = 300 * q
    if kind == "all equal":
        q, k = jnp.ones_like(q), jnp.ones_like(k)

    def run(q, k, v, weight, implementation):
        if implementation == "xla":
            sides = None if window is None else (window - 1, 0)
            attend = functools.partial(
                jax.nn.dot_product_attention, scale=0.1, is_causal=True, local_window_size=sides, implementation="xla"
            )
        else:
            pattern = c.Full() if window is None else c.Windowed(window)
            attend = functools.partial(
                lambda *a, **more: windowed_attention(*a, **more)[0],
                pattern=pattern,
                scale=0.1,
                implementation=implementation,
            )
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(weight.astype(out.dtype))

    actual, xla, exact = three_ways(run, (q, k, v, weight), "pallas_gpu", "xla")
    assert_as_exact_as_the_oracle(("out",), actual[:1], xla[:1], exact[:1], at_least=1e-5)
    # The terms of dq, weights · (dout · v − Σ dout · out) · k, cancel here; they are as exact as out, rounded to 2^-9.
    # XLA keeps all weights, and is more exact.
    norm_q, norm_k, norm_v, norm_dout = (
        float(np.linalg.norm(x, axis=-1).max()) for x in map(np.float64, (q, k, v, weight))
    )
    for name, a, e, other in zip(("dq", "dk"), actual[1:], exact[1:], (norm_k, T * norm_q), strict=False):
        assert np.abs(a - e).max() <= 2**-8 * 0.1 * norm_dout * norm_v * other, name
    assert error(actual[3], exact[3]) <= max(1.5 * error(xla[3], exact[3]), 1e-5)


E, D, F = 6, 256, 128
ROUTINGS = {
    "even": lambda P: jax.lax.top_k(jax.random.uniform(fresh_key(20), (P, E)), 2)[1],
    "one expert has all, others none": lambda P: jnp.stack([jnp.full(P, 3), jnp.full(P, E)], axis=1),
    "few tokens": lambda P: jax.lax.top_k(jax.random.uniform(fresh_key(21), (5, E)), 3)[1],
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_and_their_gradients_are_the_oracles(routing, dtype):
    experts_PK = ROUTINGS[routing](333).astype(jnp.int32)
    P, K = experts_PK.shape
    shapes = (P, D), (P, K), (E, D, 2, F), (E, F, D), (P, D)
    x, weights, w_in, w_out, dy = (jax.random.normal(fresh_key(i), shape, dtype) for i, shape in enumerate(shapes))
    w_in, w_out = w_in * D**-0.5, w_out * F**-0.5

    def run(x, weights, w_in, w_out, dy, implementation):
        def apply(*operands):
            return grouped_experts(*operands[:2], experts_PK, *operands[2:], implementation)

        y, back = jax.vjp(apply, x, weights, w_in, w_out)
        return y, *back(dy)

    results = three_ways(run, (x, weights, w_in, w_out, dy), "pallas_gpu")
    assert_as_exact_as_the_oracle(("y", "dx", "dweights", "dw_in", "dw_out"), *results, at_least=1e-5)


def test_rows_past_the_groups_may_hold_anything():
    sizes = jnp.array([70, 0, 200, 1, 19], jnp.int32)
    inside = np.arange(400) < 290
    x, w, dy = (
        jax.random.normal(fresh_key(i), s, jnp.bfloat16) for i, s in enumerate([(400, 192), (5, 192, 256), (400, 256)])
    )
    poisoned = [jnp.where(inside[:, None], a, jnp.nan) for a in (x, dy)]

    def run(x, w, dy, implementation):
        y, back = jax.vjp(lambda x, w: pick_matmul(implementation, x.dtype)(x, w, sizes), x, w)
        dx, dw = back(dy)
        return y[:290], dx[:290], dw

    cleared = [jnp.where(inside[:, None], a, 0) for a in (x, dy)]
    results = three_ways(run, (poisoned[0], w, poisoned[1]), "pallas_gpu", finite=(cleared[0], w, cleared[1]))
    assert_as_exact_as_the_oracle(("y", "dx", "dw"), *results, at_least=1e-5)
    np.testing.assert_array_equal(results[0][2][1], 0)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=lambda dtype: jnp.dtype(dtype).name)
def test_quantized_experts_are_those_of_the_weights_they_stand_for(dtype):
    """Many steps of the ring: tiles are widened while others are multiplied."""
    experts_PK, D, F = ROUTINGS["even"](500).astype(jnp.int32), 2048, 1024
    shapes = (500, D), (500, 2), (E, D, 2, F), (E, F, D)
    x, weights, w_in, w_out = (jax.random.normal(fresh_key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    w_in, w_out = (quantized.quantize(w.astype(jnp.float32) * w.shape[1] ** -0.5, dtype) for w in (w_in, w_out))
    plain = [quantized.dequantize(w, jnp.bfloat16) for w in (w_in, w_out)]
    actual, again = (grouped_experts(x, weights, experts_PK, w_in, w_out, "pallas_gpu") for _ in range(2))
    np.testing.assert_array_equal(actual, again)
    assert error(actual, grouped_experts(x, weights, experts_PK, *plain, "pallas_gpu")) < 1e-2  # 8 bits of plain


# new tokens, slots, query heads, key heads, widths, soft-cap
DECODE = {
    "one token, grouped": (1, 1000, 8, 2, 128, 128, None),
    "a draft of three, soft-cap": (3, 1000, 8, 2, 128, 64, 5.0),
    "latent": (1, 4096, 128, 1, 576, 512, None),
    "latent, a draft of two": (2, 700, 128, 1, 576, 512, None),
}


@pytest.mark.parametrize("case", DECODE)
def test_attention_to_a_cache_is_the_oracles(case):
    T, S, H, G, N, M, softcap = DECODE[case]
    q = jax.random.normal(fresh_key(0), (3, T, H, N), jnp.bfloat16)
    k = jax.random.normal(fresh_key(1), (3, S, G, N), jnp.bfloat16)
    v = [] if M == 512 else [jax.random.normal(fresh_key(2), (3, S, G, M), jnp.bfloat16)]
    length_B = jnp.array([S, 300, 0])  # a row of nothing
    mask = jnp.arange(S) < jnp.maximum(length_B[:, None] - jnp.arange(T)[::-1], 0)[..., None]

    def run(q, k, *v, implementation):
        out, lse = decode_attention(q, k, v[0] if v else M, mask, scale=2 * N**-0.5, softcap=softcap,
                                    implementation=implementation)  # fmt: skip
        return out, jnp.where(jnp.isfinite(lse), lse, 0), jnp.isneginf(lse)

    results = three_ways(run, (q, k, *v), "pallas_gpu")
    assert_as_exact_as_the_oracle(("out", "log-sum-exp", "sees nothing"), *results, at_least=1e-5)
