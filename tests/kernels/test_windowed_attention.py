"""Every implementation of attention against the whole masked score matrix, and the work that the blocked one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention import IMPLEMENTATIONS, windowed_attention
from dsv3_jax.kernels.windowed_attention.blocked import block_size, plan_runs
from dsv3_jax.ops.patterns import Place, reach
from tests.conftest import assert_close, fresh_key

PATTERNS = [
    c.Full(),
    c.Windowed(1),
    c.Windowed(7),
    c.Windowed(20, global_positions=(0, 3)),
    c.Windowed(5, global_positions=(2, 40)),
    c.Windowed(18, stride=9),
    c.Windowed(10, stride=4, global_positions=(1,)),
    c.RuntimeWindowed(20, (0,)),
    c.Segmented(9),
    c.Segmented(9, keys="all"),
    c.LearnedGlobal(8, 8, 3),
    c.LearnedGlobal(20, 5, 4),
]
BIDIRECTIONAL = [*PATTERNS, c.Windowed(6, global_fractions=(0.0, 0.5, 1.0), global_positions=(0, 4))]
CASES = [(p, True) for p in PATTERNS] + [(p, False) for p in BIDIRECTIONAL]
B, T, H, G, N, M = 4, 70, 4, 2, 8, 6
FAST = [
    name for name in IMPLEMENTATIONS if name not in ("reference", "cudnn")
]  # which takes few of the cases: test_cudnn


def inputs(dtype=jnp.float32, length=T):
    keys = jax.random.split(fresh_key(), 3)
    shapes = [(B, length, H, N), (B, length, G, N), (B, length, G, M)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def packed():
    """Three documents and padding; two documents; one; padding, then a document."""
    lengths = [30, 25, 10]
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(T - sum(lengths), int)])
    positions = np.concatenate([np.arange(n) for n in [*lengths, T - sum(lengths)]])
    other_segments = np.where(np.arange(T) < 41, 1, 2)
    other_positions = np.where(np.arange(T) < 41, np.arange(T), np.arange(T) - 41)
    late = np.maximum(np.arange(T) - 9, 0), (np.arange(T) >= 9) * 1
    rows = [(positions, segments), (other_positions, other_segments), (np.arange(T), np.ones(T)), late]
    return Place(*(jnp.asarray(np.stack(x), jnp.int32) for x in zip(*rows, strict=True)))


def unpacked():
    return Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32))


def attend_and_differentiate(name, place, pattern, causal, softcap, few=False):
    """few: a row that begins with padding and one that ends with it, and one key head."""
    rows, heads = ((0, 3), (2, 1, 1)) if few else (range(B), (H, G, G))
    q, k, v = (x[jnp.array(rows), :, :count] for x, count in zip(inputs(), heads, strict=True))
    place = jax.tree.map(lambda x_BT: x_BT[jnp.array(rows)], place)
    gate = jax.random.normal(fresh_key(7), (B, T)) if isinstance(pattern, c.LearnedGlobal) else None
    gate = gate if gate is None else gate.at[1:].set(jnp.round(gate[1:]))[jnp.array(rows)]  # and ties: the first
    if isinstance(pattern, c.RuntimeWindowed):
        window_BT = jax.random.randint(fresh_key(8), (len(rows), T), 1, pattern.window + 1)
        place = place._replace(window_BT=window_BT)

    def total(q, k, v, gate):
        out, lse = windowed_attention(
            q,
            k,
            v,
            pattern=pattern,
            causal=causal,
            scale=0.3,
            place=place,
            gate_BT=gate,
            softcap=softcap,
            max_segments=3,
            implementation=name,
        )
        lse = jnp.where(jnp.isfinite(lse), lse, 0)  # padding sees nothing
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    argnums = (0, 1, 2) if gate is None else (0, 1, 2, 3)
    return jax.jit(jax.grad(total, argnums=argnums, has_aux=True))(q, k, v, gate)


# An interpreted kernel takes seconds to compile, one for a GPU half a minute to run: a few in time, others among the
# slow tests. The GPU's interpreter has fewer rows and heads.
EVERY_NTH = {"blocked": 1, "pallas_tpu": 8, "pallas_gpu": 25}
EVERY = [
    pytest.param(pattern, causal, name, marks=pytest.mark.slow if (len(CASES) - 1 - index) % EVERY_NTH[name] else ())
    for name in FAST
    for index, (pattern, causal) in enumerate(CASES)
    if name != "pallas_gpu" or index % 12 == 0
]


@pytest.mark.parametrize(("pattern", "causal", "implementation"), EVERY, ids=str)
def test_outputs_and_gradients_are_the_oracles(pattern, causal, implementation):
    softcap = 2.0 if pattern in PATTERNS[1::2] else None
    args = (packed(), pattern, causal, softcap, implementation == "pallas_gpu")
    # float32: the softmax is summed in another order
    assert_close(attend_and_differentiate(implementation, *args), attend_and_differentiate("reference", *args), 2e-5)


def test_the_gate_is_trained_through_what_it_lets_through():
    gradients, _ = attend_and_differentiate("blocked", unpacked(), c.LearnedGlobal(8, 8, 3), True, None)
    dgate = np.asarray(gradients[3])
    assert np.count_nonzero(dgate) >= B * 3  # at least the best keys of the last block
    assert np.all(dgate[:, T // 8 * 8 :] == 0)  # nobody comes after the last block


def test_a_window_at_run_time_is_the_window_of_the_config_without_another_compilation():
    @jax.jit
    def attend(window):
        place = unpacked()._replace(window_BT=jnp.broadcast_to(window, (B, T)))
        return windowed_attention(*inputs(), pattern=c.RuntimeWindowed(20, (0,)), scale=0.3, place=place)[0]

    for window in (1, 5, 20):
        pattern = c.Windowed(window, global_positions=(0,))
        fixed = windowed_attention(*inputs(), pattern=pattern, scale=0.3, implementation="reference")[0]
        assert_close(attend(jnp.int32(window)), fixed, 1e-5)
    assert attend._cache_size() == 1


def test_segments_over_all_keys_are_full_attention():
    def attend(pattern):
        return jax.jit(lambda q, k, v: windowed_attention(q, k, v, pattern=pattern, scale=0.3))(*inputs())

    assert_close(attend(c.Segmented(16, keys="all")), attend(c.Full()), 1e-6)


@pytest.mark.parametrize("implementation", [name for name in FAST if name != "pallas_gpu"])  # on the GPU: test_on_gpu
def test_bf16_is_as_close_to_float64_as_the_oracle_in_bf16(implementation):
    q, k, v = inputs(jnp.bfloat16)
    with jax.enable_x64(True):
        exact_inputs = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        exact = windowed_attention(*exact_inputs, pattern=c.Windowed(20), scale=0.3, implementation="reference")[0]
    errors = {}
    for name in (implementation, "reference"):
        out = windowed_attention(q, k, v, pattern=c.Windowed(20), scale=0.3, implementation=name)[0]
        assert out.dtype == jnp.bfloat16
        errors[name] = np.abs(np.asarray(out, np.float64) - np.asarray(exact)).max()
    # both round the output to 8 bits; the products' rounding differs by about as much
    assert errors[implementation] <= 2 * errors["reference"] + 2**-8


def test_padding_gives_zeros_and_minus_infinity():
    out, lse = windowed_attention(
        *inputs(), pattern=c.Windowed(20, global_positions=(0,)), scale=0.3, max_segments=3, place=packed()
    )
    np.testing.assert_array_equal(out[0, 65:], 0)
    assert np.all(np.isneginf(lse[0, :, 65:]))
    assert np.all(np.isfinite(lse[0, :, :65]))


def test_more_documents_than_promised_give_nan_not_a_wrong_result():
    out, _ = windowed_attention(
        *inputs(), pattern=c.Windowed(5, global_positions=(0,)), scale=0.3, max_segments=2, place=packed()
    )
    assert np.all(np.isnan(out[0, 55:65])) and np.all(np.isfinite(out[0, :55]))
    out, _ = windowed_attention(*inputs(), pattern=c.Windowed(5), scale=0.3, max_segments=2, place=packed())
    assert np.all(np.isfinite(out))


RUNS = [(1024, c.Full()), (1024, c.Windowed(128)), (8192, c.Windowed(512)), (70, c.Windowed(7)), (16, c.Full())]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "pattern"), RUNS, ids=str)
def test_runs_cover_each_block_once_and_work_grows_with_the_window(length, pattern, causal):
    block, bound = block_size(pattern, length), reach(pattern)
    count = -(-length // block)
    runs = plan_runs(count, block, bound, causal)
    assert [i for run in runs for i in range(run.first, run.first + run.count)] == list(range(count))
    for run in runs:
        for i in range(run.count):
            first_query, last_query = (run.first + i) * block, (run.first + i + 1) * block - 1
            needed = (
                0 if bound is None else max(0, first_query - bound),
                last_query if causal else min(count * block - 1, last_query + (length if bound is None else bound)),
            )
            assert (run.low + i) * block <= needed[0]
            assert (run.low + i + run.length) * block - 1 >= needed[1]
            assert run.low + i >= 0 and run.low + i + run.length <= count
    pairs = sum(run.count * run.length for run in runs)
    if bound is None:
        assert pairs == (count * (count + 1) // 2 if causal else count * count)
    else:
        assert pairs * block <= count * (1 if causal else 2) * (bound + 2 * block)


def test_memory_is_linear_in_length_for_a_window():
    def temporary(length):
        def loss(q, k, v):
            return jnp.sum(windowed_attention(q, k, v, pattern=c.Windowed(64), scale=0.3)[0])

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs(length=length)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048)


def test_errors_say_what_does_not_fit():
    q, k, v = inputs()
    with pytest.raises(c.ConfigError, match="must be one of blocked, cudnn, pallas_gpu, pallas_tpu, reference"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, implementation="flash")
    with pytest.raises(ValueError, match="not a multiple of"):
        windowed_attention(q[:, :, :3], k, v, pattern=c.Full(), scale=1.0)
    with pytest.raises(ValueError, match="gate_BT belongs to learned_global"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, gate_BT=jnp.ones((B, T)))
    with pytest.raises(ValueError, match="gate_BT belongs to learned_global"):
        windowed_attention(q, k, v, pattern=c.LearnedGlobal(), scale=1.0)
    with pytest.raises(ValueError, match="width differ"):
        windowed_attention(q[..., :4], k, v, pattern=c.Full(), scale=1.0)
