"""Attention to a cache: the kernel, interpreted, against the oracle, and compiled for TPUs."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.decode_attention import decode_attention, default_implementation
from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.kernels.decode_attention.pallas_gpu import gpu_decode_attention
from dsv3_jax.kernels.decode_attention.pallas_tpu import block_size, fits, tpu_decode_attention
from dsv3_jax.ops.caches import CacheLayout, slot_positions
from dsv3_jax.sharding import make_mesh
from tests.conftest import assert_close, fresh_key

ROOT = pathlib.Path(__file__).parents[2]
S = 300


def inputs(T, H, G, N, M, dtype=jnp.float32):
    """Queries, keys, values (M an int: of latent attention), of two rows."""
    keys = jax.random.split(fresh_key(T), 3)
    q, k = (
        jax.random.normal(key, (2, *shape), dtype) for key, shape in zip(keys, ((T, H, N), (S, G, N)), strict=False)
    )
    return q, k, M if G == 1 and M < N else jax.random.normal(keys[2], (2, S, G, M), dtype)


def ring_mask(T, window):
    """Of a ring after 417 tokens, and of one that holds only 20: what the last T tokens see of the slots."""
    length_B = jnp.array([417, 20])
    slot_BS = slot_positions(CacheLayout(S), length_B)[:, None, :]
    position_BT = (length_B[:, None] - T + jnp.arange(T))[:, :, None]
    return (slot_BS >= 0) & (slot_BS <= position_BT) & (slot_BS > position_BT - window)


CASES = {
    "one token, grouped": (1, 4, 2, 16, 16, None),
    "a draft of three, soft-cap": (3, 4, 2, 16, 8, 5.0),
    "latent": (1, 8, 1, 24, 16, None),
    "latent, a draft of two": (2, 8, 1, 24, 16, None),
}


# The GPU's interpreter takes half a minute a case; on the GPU itself: test_on_gpu.py.
EVERY = [pytest.param("pallas_tpu", case) for case in CASES]
EVERY += [
    pytest.param("pallas_gpu", case, marks=pytest.mark.slow)
    for case in ("a draft of three, soft-cap", "latent, a draft of two")
]


@pytest.mark.parametrize(("implementation", "case"), EVERY)
def test_outputs_and_log_sum_exp_are_the_oracles(implementation, case):
    T, *shape, softcap = CASES[case]
    q, k, v = inputs(T, *shape)
    mask = ring_mask(T, 100).at[1, 0].set(False)  # one token sees nothing
    bias = jax.random.normal(fresh_key(5), mask.shape)
    more = {"scale": 0.3, "bias_BTS": bias, "softcap": softcap}
    actual = decode_attention(q, k, v, mask, implementation=implementation, **more)
    expected = decode_attention(q, k, v, mask, implementation="reference", **more)
    np.testing.assert_array_equal(actual[0][1, 0], 0)
    np.testing.assert_array_equal(jnp.isneginf(actual[1]), jnp.isneginf(expected[1]))
    finite = [jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), result) for result in (actual, expected)]
    assert_close(*finite, 1e-5)


def test_devices_work_on_their_own_rows_and_heads():
    """The latent is one key head for all: each device has a copy for its query heads."""
    q, k, v = inputs(2, 8, 1, 24, 16)
    mask = ring_mask(2, 100)
    attend = jax.jit(lambda q, k: decode_attention(q, k, v, mask, scale=0.3, implementation="pallas_tpu"))
    with jax.set_mesh(make_mesh(c.MeshConfig(fsdp=2, model=2))):
        together = attend(q, k)
    assert "fsdp" in together[0].sharding.spec[0] and "model" in together[0].sharding.spec[2]
    expected = decode_attention(q, k, v, mask, scale=0.3, implementation="reference")
    assert_close(jax.device_get(together), jax.device_get(expected), 1e-5)


@pytest.mark.quick
def test_blocks_that_nobody_sees_are_not_read():
    """NaN in them would show: 0 · NaN is NaN."""
    q, k, v = inputs(1, 4, 2, 16, 16)
    mask = jnp.broadcast_to(jnp.arange(S) >= 256, (2, 1, S))
    poisoned = [jnp.where((jnp.arange(S) < 256)[:, None, None], jnp.nan, x) for x in (k, v)]
    bias = jnp.where(mask, 0.0, -jnp.inf)
    actual = tpu_decode_attention(Call(q, *poisoned, bias, 0.3), block=128)
    assert_close(actual, decode_attention(q, k, v, mask, scale=0.3, implementation="reference"), 1e-5)


@pytest.mark.quick
def test_blocks_fit_and_what_does_not_is_refused(monkeypatch):
    assert block_size(32768, 576 * 2) == 1024 and block_size(32768, 16384) == 256 and block_size(70, 64) == 128
    assert fits(2 * 64 * 128 * 2) and not fits(2 * 256 * 128 * 2)

    def of(dtype=jnp.bfloat16, tokens=1, key_heads=1, width=576, value_width: int | None = 512):
        """A call of latent attention; without a value width of grouped heads."""
        q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, tokens, 128, width), (2, S, key_heads, width)))
        return Call(
            cast(Any, q), cast(Any, k), cast(Any, k) if value_width is None else value_width, cast(Any, None), 1.0
        )

    grouped = {"key_heads": 8, "width": 128, "value_width": None}
    assert default_implementation(of()) == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert default_implementation(of()) == default_implementation(of(**grouped)) == "pallas_tpu"
    for refused in (of(jnp.float16), of(**grouped | {"key_heads": 256})):
        assert default_implementation(refused) == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert default_implementation(of()) == default_implementation(of(jnp.float16, **grouped)) == "pallas_gpu"
    for refused in (of(jnp.float32), of(value_width=576), of(tokens=300)):  # their biases fill shared memory
        assert default_implementation(refused) == "reference"
    monkeypatch.undo()
    q, k, v = inputs(1, 4, 2, 16, 16)
    with pytest.raises(ConfigError, match="implementation='flash': must be one of pallas_gpu, pallas_tpu, reference"):
        decode_attention(q, k, v, ring_mask(1, 9), scale=1.0, implementation="flash")
    wide = jnp.zeros((2, S, 1, 576))
    with pytest.raises(ConfigError, match="'pallas_gpu': values 576 wide do not fit .* at most 512"):
        decode_attention(wide[:, :1], wide, wide, ring_mask(1, 9), scale=1.0, implementation="pallas_gpu")
    wide = jnp.zeros((2, S, 1, 512), jnp.bfloat16)
    with pytest.raises(ConfigError, match="keys 512 and values 512 wide and 1 tokens do not fit .* of shared memory"):
        decode_attention(wide[:, :1], wide, wide, ring_mask(1, 9), scale=1.0, implementation="pallas_gpu")


@pytest.mark.slow
def test_slots_are_split_over_blocks_of_threads_and_merged():
    """Values 300 wide take two warpgroups. Of the second row one block is seen: two shares have none."""
    q, k, _ = inputs(1, 8, 1, 330, 300)
    mask = ring_mask(1, 100)
    k = jnp.where((jnp.arange(S) >= 32)[None, :, None, None] & (jnp.arange(2) == 1)[:, None, None, None], jnp.nan, k)
    actual = gpu_decode_attention(Call(q, k, 300, jnp.where(mask, 0.0, -jnp.inf), 0.3), splits=3)
    seen = jnp.where(jnp.isnan(k), 0.0, k)
    assert_close(actual, decode_attention(q, seen, 300, mask, scale=0.3, implementation="reference"), 1e-5)


PROGRAM = """
import sys
from dsv3_jax.planning.topologies import on_one_device, prepare_tpu_compiler, tpu_topology
prepare_tpu_compiler(sys.argv[1])
import jax, jax.numpy as jnp
from dsv3_jax.kernels.decode_attention.pallas_gpu import gpu_decode_attention
from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.kernels.decode_attention.pallas_tpu import tpu_decode_attention
jax.config.update("jax_enable_compilation_cache", False)
sharding = on_one_device(tpu_topology(sys.argv[1]))
for T, S, H, G, N, M in ((1, 32768, 128, 1, 576, 512), (4, 32768, 128, 1, 576, 512), (1, 131072, 32, 8, 128, 128),
                         (1, 33000, 32, 8, 128, 128), (1, 4096, 128, 64, 128, 128), (2, 4096, 8, 2, 64, 64),
                         (1, 70, 4, 2, 16, 8)):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
    def run(q, bias, k, *v):  # a cache has the heads of a token in one dimension
        values = v[0].reshape(2, S, G, M) if v else M
        return tpu_decode_attention(Call(q, k.reshape(2, S, G, N), values, bias, 0.1), interpret=False)
    arrays = [shape(2, S, G * N)] if G == 1 else [shape(2, S, G * N), shape(2, S, G * M)]
    compiled = jax.jit(run).lower(shape(2, T, H, N), shape(2, T, S, dtype=jnp.float32), *arrays).compile()
    print(T, S, compiled.memory_analysis().temp_size_in_bytes, compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make peers")
@pytest.mark.parametrize("kind", ["v5p", "v6e"])
def test_the_kernel_compiles_and_needs_little_memory(kind):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 7
    for T, slots, temporary, kernels in lines:
        assert kernels >= 1
        # Biases, of a token and a slot, and numbers of blocks. XLA may give a program's input that is 576 wide, no
        # multiple of 128 lanes, another layout, and then copies it once.
        copied = 2 * slots * 640 * 2 if slots == 32768 else 0
        assert temporary < 2 * T * slots * 32 + 2**20 + copied, (T, slots, temporary)
