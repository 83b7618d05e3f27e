"""Blocked attention against the whole masked score matrix: outputs, log-sum-exp, gradients, and work done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention import IMPLEMENTATIONS, windowed_attention
from dsv3_jax.kernels.windowed_attention.blocked import block_size, plan_runs
from tests.conftest import assert_close

PATTERNS = [c.Full(), c.Windowed(1), c.Windowed(7), c.Windowed(20, (0, 3)), c.Windowed(5, (2, 40)), c.Segmented(9)]
B, T, H, G, N, M = 2, 70, 4, 2, 8, 6
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]


def inputs(dtype=jnp.float32, length=T):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, length, H, N), (B, length, G, N), (B, length, G, M)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def packed():
    lengths = [30, 25, 10]
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(T - sum(lengths), int)])
    positions = np.concatenate([np.arange(n) for n in [*lengths, T - sum(lengths)]])
    other_segments = np.where(np.arange(T) < 41, 1, 2)
    other_positions = np.where(np.arange(T) < 41, np.arange(T), np.arange(T) - 41)
    return {
        "positions_BT": jnp.asarray(np.stack([positions, other_positions]), jnp.int32),
        "segment_ids_BT": jnp.asarray(np.stack([segments, other_segments]), jnp.int32),
    }


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("packing", [{}, packed()], ids=["one document", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_outputs_and_gradients_are_the_oracles(pattern, packing, implementation):
    def run(name):
        def total(q, k, v):
            out, lse = windowed_attention(
                q, k, v, pattern=pattern, scale=0.3, max_segments=3, implementation=name, **packing
            )
            lse = jnp.where(jnp.isfinite(lse), lse, 0)  # padding sees nothing
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs())

    # float32: the softmax is summed in another order
    assert_close(run(implementation), run("reference"), 2e-5, str(pattern))


@pytest.mark.parametrize("implementation", FAST)
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
    out, lse = windowed_attention(*inputs(), pattern=c.Windowed(20, (0,)), scale=0.3, max_segments=3, **packed())
    np.testing.assert_array_equal(out[0, 65:], 0)
    assert np.all(np.isneginf(lse[0, :, 65:]))
    assert np.all(np.isfinite(lse[0, :, :65]))


def test_more_documents_than_promised_give_nan_not_a_wrong_result():
    out, _ = windowed_attention(*inputs(), pattern=c.Windowed(5, (0,)), scale=0.3, max_segments=2, **packed())
    assert np.all(np.isnan(out[0, 55:65])) and np.all(np.isfinite(out[0, :55]))
    out, _ = windowed_attention(*inputs(), pattern=c.Windowed(5), scale=0.3, max_segments=2, **packed())
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize(("length", "reach"), [(1024, None), (1024, 127), (8192, 511), (70, 6), (16, None)])
def test_runs_cover_each_block_once_and_work_grows_with_the_window(length, reach):
    block = block_size(length, reach)
    count = -(-length // block)
    runs = plan_runs(count, block, reach)
    assert [i for run in runs for i in range(run.first, run.first + run.count)] == list(range(count))
    for run in runs:
        oldest_key = (run.first - run.length + 1) * block
        needed = 0 if reach is None else max(0, run.first * block - reach)
        assert 0 <= oldest_key <= needed
    pairs = sum(run.count * run.length for run in runs)
    assert pairs == count * (count + 1) // 2 if reach is None else pairs * block <= count * (reach + 2 * block)


def test_memory_is_linear_in_length_for_a_window():
    def temporary(length):
        def loss(q, k, v):
            return jnp.sum(windowed_attention(q, k, v, pattern=c.Windowed(64), scale=0.3)[0])

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs(length=length)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048)


def test_errors_say_what_does_not_fit():
    q, k, v = inputs()
    with pytest.raises(c.ConfigError, match="must be one of blocked, reference"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, implementation="flash")
    with pytest.raises(ValueError, match="not a multiple of"):
        windowed_attention(q[:, :, :3], k, v, pattern=c.Full(), scale=1.0)
    with pytest.raises(ValueError, match="both positions and segment ids"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, segment_ids_BT=jnp.ones((B, T), jnp.int32))
    with pytest.raises(ValueError, match="width differ"):
        windowed_attention(q[..., :4], k, v, pattern=c.Full(), scale=1.0)
