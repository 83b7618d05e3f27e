"""The GPU kernels, interpreted: blocks, hard inputs, refusals. The test base that every implementation runs is
`test_windowed_attention.py`; compilation for a GPU is in `test_gpu_compilation.py`."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.windowed_attention import api, windowed_attention
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.intervals import (
    key_blocks,
    query_blocks,
    visible_interval,
    whole_key_blocks,
    whole_query_blocks,
)
from dsv3_jax.kernels.windowed_attention.pallas_gpu import gpu_attention
from dsv3_jax.kernels.windowed_attention.reference import pattern_attention
from dsv3_jax.ops.patterns import Place
from tests.conftest import assert_close, fresh_key
from tests.kernels.attention_calls import call_of, place_of
from tests.kernels.pallas_calls import costs


@pytest.mark.quick
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [c.Full(), c.Windowed(100), c.Segmented(90)], ids=str)
def test_every_pair_that_sees_each_other_is_in_a_block_that_is_copied(pattern, causal):
    place = place_of(300, 31, 400, padding=37)  # 768
    first_BT, last_BT = visible_interval(pattern, causal, place)
    row_T = np.arange(768)
    sees_TS = (row_T >= np.asarray(first_BT)[0][:, None]) & (row_T <= np.asarray(last_BT)[0][:, None])
    for q_block, k_block in ((128, 128), (128, 64), (64, 128)):
        of_queries = np.asarray(key_blocks(first_BT, last_BT, q_block, k_block))[0]
        of_keys = np.asarray(query_blocks(first_BT, last_BT, q_block, k_block))[0]
        pairs = sees_TS.reshape(768 // q_block, q_block, 768 // k_block, k_block)
        seen_nm, whole_nm = pairs.any(axis=(1, 3)), pairs.all(axis=(1, 3))
        for bounds, seen in ((of_queries, seen_nm), (of_keys, seen_nm.T)):
            for (start, stop), row in zip(bounds, seen, strict=True):
                assert (start, stop) == ((row.argmax(), len(row) - row[::-1].argmax()) if row.any() else (0, 0))
        for of, whole in ((whole_key_blocks, whole_nm), (whole_query_blocks, whole_nm.T)):
            blocks = np.arange(whole.shape[1])
            for (start, stop), row in zip(np.asarray(of(first_BT, last_BT, q_block, k_block))[0], whole, strict=True):
                np.testing.assert_array_equal((blocks >= start) & (blocks < stop), row)


@pytest.mark.quick
def test_of_several_runs_of_queries_that_see_whole_keys_the_first_is_not_masked():
    """Windows set at run time, of each query its own."""
    position_BT = jnp.arange(16)[None]
    window_BT = jnp.where((position_BT >= 8) & (position_BT < 12), 3, 16)
    place = Place(position_BT, jnp.ones((1, 16), jnp.int32), window_BT)
    first_BT, last_BT = visible_interval(c.RuntimeWindowed(16), True, place)
    whole = np.asarray(whole_query_blocks(first_BT, last_BT, 4, 4))[0]
    np.testing.assert_array_equal(whole, [[1, 2], [3, 4], [3, 4], [0, 0]])


@pytest.mark.quick
def test_blocks_that_are_copied_grow_with_the_window_not_with_the_square():
    def copied(pattern, T):
        first_BT, last_BT = visible_interval(pattern, True, place_of(T))
        bounds = [key_blocks(first_BT, last_BT, 128, 128), query_blocks(first_BT, last_BT, 64, 128)]
        return [int(jnp.sum(x[..., 1] - x[..., 0])) for x in bounds]

    # Of the window, its edge and the diagonal: 5 blocks of keys for each of 64 blocks, less what is before the start.
    assert copied(c.Windowed(512), 8192) == [5 * 64 - 10, 10 * 64 - 20]
    assert copied(c.Windowed(512), 16384) == [5 * 128 - 10, 10 * 128 - 20]
    assert copied(c.Full(), 8192) == [64 * 65 // 2, 64 * 65]


@pytest.mark.quick
@pytest.mark.skipif(not hopper.TAKES_COST, reason="jax hands the costs of GPU kernels on from 0.12")
def test_costs_are_those_of_the_blocks_that_are_seen():
    x = jnp.ones((1, 1024, 2, 128), jnp.bfloat16)

    def total(q, k, v):
        call = Call(q, k, v, place_of(1024), c.Windowed(256), 0.1)
        return jnp.sum(gpu_attention(call, interpret=False)[0].astype(jnp.float32))

    found = costs(jax.grad(total, argnums=(0, 1, 2)), x, x, x)
    pairs = 2 * (1 + 2 + 6 * 3) * 128**2  # of blocks of 128: the diagonal and two before it
    assert [cost.flops for cost in found] == [2 * pairs * products * 128 for products in (2, 3, 4)]
    moved = [cost.bytes_accessed for cost in found]
    assert all(4 * 2 * 1024 * 128 * 2 < each < 10 * 2 * 1024 * 128 * 2 for each in moved), moved


LONG = [(c.Windowed(200), True, None, (230, 150)), (c.Windowed(140), False, 4.0, (380,))]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "causal", "softcap", "lengths"), LONG, ids=str)
def test_several_blocks_whole_masked_and_unseen_are_the_oracles(pattern, causal, softcap, lengths):
    """Three blocks of queries, the last ending in padding; two query heads of a key head; unequal widths."""
    T = sum(lengths) + 4
    shapes = [(1, T, 2, 72), (1, T, 1, 72), (1, T, 1, 40)]
    q, k, v = (jax.random.normal(fresh_key(i), shape) for i, shape in enumerate(shapes))
    call = Call(q, k, v, place_of(*lengths, padding=4), pattern, 0.3, causal, softcap=softcap)

    def both(attend):
        def total(q, k, v):
            out, lse = attend(call._replace(q_BTHN=q, k_BTGN=k, v_BTGM=v))
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0))), (out, lse)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    actual, expected = both(gpu_attention), both(pattern_attention)
    np.testing.assert_array_equal(jnp.isneginf(actual[1][1]), jnp.isneginf(expected[1][1]))
    assert_close(*(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), r) for r in (actual, expected)), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["large logits", "all equal", "one key"])
def test_hard_inputs_are_as_exact_as_the_oracle(kind):
    T = 40
    q, k, v = (jax.random.normal(fresh_key(i), (1, T, 1, 64), jnp.float32) for i in range(3))
    q, k = {"large logits": (300 * q, k), "all equal": (jnp.ones_like(q), jnp.ones_like(k)), "one key": (q, k)}[kind]
    pattern = c.Windowed(1) if kind == "one key" else c.Full()
    with jax.enable_x64(True):
        exact_inputs = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        exact, _ = pattern_attention(Call(*exact_inputs, place_of(T), pattern, 0.3))
    errors = [
        np.abs(np.asarray(attend(Call(q, k, v, place_of(T), pattern, 0.3))[0], np.float64) - np.asarray(exact)).max()
        for attend in (gpu_attention, pattern_attention)
    ]
    assert errors[0] <= 2 * errors[1] + 4 * np.finfo(np.float32).eps, errors


@pytest.mark.quick
def test_what_the_kernel_cannot_run_is_refused_by_name(monkeypatch):
    def attend(dtype, width):
        x = jnp.ones((1, 4, 1, width), dtype)
        return windowed_attention(x, x, x, pattern=c.Full(), scale=1.0, implementation="pallas_gpu")

    for width in (160, 256):  # 160 is 192 in the kernels
        with pytest.raises(c.ConfigError, match=f"'pallas_gpu': keys and values {width} and {width} wide do not fit"):
            attend(jnp.bfloat16, width)
    assert api.refusal("pallas_gpu", call_of(jnp.bfloat16, 32, 288))
    assert not api.refusal("pallas_gpu", call_of(jnp.bfloat16, 160, 96))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [None] * 2)
        with pytest.raises(c.ConfigError, match="takes four threads: set XLA_FLAGS"):
            attend(jnp.bfloat16, 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(c.ConfigError, match="tensor cores multiply bfloat16 and float16, not float32"):
        attend(jnp.float32, 64)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(c.ConfigError, match=r"Hopper, compute capability 9.0; this GPU has 8.0"):
        attend(jnp.bfloat16, 64)
    assert api.default_implementation(call_of(jnp.bfloat16)) == "blocked"
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert api.default_implementation(call_of(jnp.bfloat16)) == "pallas_gpu"
    assert api.default_implementation(call_of(jnp.float32)) == "blocked"
