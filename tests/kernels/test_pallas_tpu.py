"""The TPU kernels, interpreted: steps, blocks, hard inputs, several devices. The test base that every implementation
runs is `test_windowed_attention.py`; compilation for TPUs is in `test_tpu_compilation.py`."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention import api, windowed_attention
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.intervals import (
    LOWER,
    MASKED,
    SKIPPED,
    UPPER,
    WHOLE,
    block_pairs,
    schedule_by_key,
    schedule_by_query,
    under_way,
    visible_interval,
)
from dsv3_jax.kernels.windowed_attention.pallas_tpu import WAITING, Blocks, _Specs, block_sizes, tpu_attention
from dsv3_jax.kernels.windowed_attention.reference import pattern_attention
from dsv3_jax.kernels.windowed_attention.tpu_kernels import Settings
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import make_mesh
from tests.conftest import assert_close, fresh_key
from tests.kernels.attention_calls import call_of
from tests.kernels.pallas_calls import calls


def draw(seed, B, T, H, G, N, M, dtype=jnp.float32):
    keys = jax.random.split(fresh_key(seed), 3)
    shapes = [(B, T, H, N), (B, T, G, N), (B, T, G, M)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def whole_row(B, T):
    return Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32))


@pytest.mark.quick
def test_steps_of_the_grids_grow_with_the_window():
    """Forward and backward, the latter for each of two query heads of a key head; and with two backward kernels."""

    def steps(pattern, T, **options):
        args = [jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]

        def loss(q, k, v):
            call = Call(q, k, v, whole_row(1, T), pattern, 0.1)
            out, _ = tpu_attention(call, blocks=Blocks(512, 512, 128), **options)
            return jnp.sum(out.astype(jnp.float32))

        return [call["grid"] for call in calls(jax.grad(loss, argnums=(0, 1, 2)), *args)]

    assert steps(c.Windowed(512), 8192) == [(1, 4, 31, 1), (1, 2, 31, 2)]
    assert steps(c.Windowed(512), 16384) == [(1, 4, 63, 1), (1, 2, 63, 2)]
    assert steps(c.Windowed(512), 16384, waiting=0) == [(1, 4, 63, 1), (1, 2, 63, 2), (1, 4, 63, 1)]
    assert steps(c.Full(), 8192) == [(1, 4, 136, 1), (1, 2, 136, 2)]
    assert len(steps(c.Full(), 65536)) == 3  # what waits would take 32 MiB for each of two query heads


def attend(blocks, place, pattern, q, k, v, **options):
    def total(q, k, v):
        out, lse = tpu_attention(Call(q, k, v, place, pattern, 0.2), blocks=blocks, **options)
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
    results += [attend(BLOCKS[0], place, c.Windowed(90), q, k, v, waiting=0)]  # two backward kernels
    for result in results[1:]:
        assert_close(result, results[0], 1e-5)


def kinds(pattern, causal, place, blocks) -> set[int]:
    """That occur in a forward pass."""
    T = place.position_BT.shape[1]
    rows = visible_interval(pattern, causal, place)
    rows = [jnp.pad(x, ((0, 0), (0, -T % 256)), constant_values=e) for x, e in zip(rows, (T, -1), strict=True)]
    pairs = block_pairs(pattern, causal, T, blocks.query, blocks.key)
    return set(np.asarray(schedule_by_query(pairs, *rows, *blocks).kind_BS).ravel().tolist())


LONG = [
    (c.Full(), True, None, Blocks(256, 256, 128), {SKIPPED, MASKED, WHOLE, LOWER}, WAITING),
    (c.Windowed(400), True, 5.0, Blocks(256, 256, 128), {SKIPPED, MASKED, LOWER}, WAITING),
    (c.Windowed(256), True, None, Blocks(256, 256, 128), {LOWER, UPPER}, 0),
    (c.Windowed(256), True, None, Blocks(256, 256, 128), {LOWER, UPPER}, WAITING),
    (c.Full(), False, 5.0, Blocks(128, 256, 128), {SKIPPED, MASKED, WHOLE}, WAITING),
    (c.Full(), False, 5.0, Blocks(128, 256, 128), {SKIPPED, MASKED, WHOLE}, 0),
    (c.Windowed(400), False, None, Blocks(256, 128, 128), {MASKED, WHOLE}, WAITING),
    (c.Windowed(160), False, None, Blocks(128, 128, 128), {SKIPPED, MASKED}, WAITING),
]


FAST = [(c.Full(), WAITING), (c.Windowed(256), 0), (c.Windowed(160), WAITING)]  # the last: four query blocks wait
IN_TIME = [
    pytest.param(*case, marks=() if (case[0], case[-1]) in FAST and case[2] is None else pytest.mark.slow)
    for case in LONG
]


def documents():
    """A row of three documents and padding, a row of one; 700 tokens each."""
    T, lengths = 700, (330, 40, 310)
    segments = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(lengths)), np.zeros(T - sum(lengths))])
    positions = np.concatenate([np.arange(n) for n in (*lengths, T - sum(lengths))])
    rows = ((positions, np.arange(T)), (segments, np.ones(T)))
    return Place(*(jnp.asarray(np.stack([x, y]), jnp.int32) for x, y in rows))


def assert_agrees_with_the_oracle(pattern, causal, softcap, **options):
    """Four query heads of two key heads."""
    place = documents()
    q, k, v = draw(3, *place.position_BT.shape, 4, 2, 24, 16)

    def both(attend):
        def total(q, k, v):
            out, lse = attend(Call(q, k, v, place, pattern, 0.3, causal, softcap=softcap))
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0))), (out, lse)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    actual, expected = both(functools.partial(tpu_attention, **options)), both(pattern_attention)
    assert_close(*(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), r) for r in (actual, expected)), 3e-5)
    np.testing.assert_array_equal(jnp.isneginf(actual[1][1]), jnp.isneginf(expected[1][1]))


@pytest.mark.parametrize(("pattern", "causal", "softcap", "blocks", "occur", "waiting"), IN_TIME, ids=str)
def test_many_blocks_of_every_kind_agree_with_the_oracle(pattern, causal, softcap, blocks, occur, waiting):
    assert kinds(pattern, causal, documents(), blocks) >= occur
    assert_agrees_with_the_oracle(pattern, causal, softcap, blocks=blocks, waiting=waiting)


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [WAITING, 0])
def test_blocks_are_on_the_chip_when_they_are_read_and_are_written_when_they_are_complete(waiting, monkeypatch):
    """In the interpreter that models memories and copies: it reads NaN where nothing was copied, and finds races."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    kernels, make = [], interpreter.RaceDetectionState
    monkeypatch.setattr(interpreter, "RaceDetectionState", lambda *a, **k: kernels.append(make(*a, **k)) or kernels[-1])
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    options = {"blocks": Blocks(128, 128, 128), "waiting": waiting, "interpret": interpret}
    assert_agrees_with_the_oracle(c.Windowed(400), True, None, **options)
    assert len(kernels) == (2 if waiting else 3) and not any(kernel.races_found for kernel in kernels)


@pytest.mark.quick
@pytest.mark.parametrize(("pattern", "causal"), [(c.Windowed(400), True), (c.Windowed(160), False), (c.Full(), True)])
def test_gradients_of_queries_are_written_once(pattern, causal):
    """Memory is written when the index of the block on the chip changes, with what that block holds then."""
    S, T, group, key_heads = 128, 1024, 3, 2
    first_BT, last_BT = visible_interval(pattern, causal, whole_row(1, T))
    schedule = schedule_by_key(block_pairs(pattern, causal, T, S, S), first_BT, last_BT, S, S, S)
    oldest_S, newest_S = under_way(schedule)
    settings = Settings(1.0, None, S, S, S, np.empty(0), 0, True)
    index = _Specs(settings, schedule, group, by_key=True).completed(64).index_map
    visits = [
        (head, step, member, tuple(int(x) for x in index(0, head, step, member, *[None] * 4, oldest_S, newest_S)))
        for head in range(key_heads)
        for step in range(len(oldest_S))
        for member in range(group)
    ]
    written = [
        (visit, head * group + member, schedule.other_S[step], step)
        for (head, step, member, visit), (*_, following) in zip(visits, [*visits[1:], (None,)], strict=True)
        if visit != following
    ]
    assert len(written) == key_heads * group * T // S == len({visit for visit, *_ in written})
    for (_, head, block, _), of_head, of_block, step in written:  # by the member and the step that complete it
        assert (head, block) == (of_head, of_block)
        assert block not in schedule.other_S[step + 1 :]


@pytest.mark.quick
def test_a_schedule_that_no_tpu_can_hold_is_refused():
    args = [jax.ShapeDtypeStruct((16, 131072, heads, 128), jnp.bfloat16) for heads in (8, 1, 1)]
    with pytest.raises(c.ConfigError, match="the schedule of 16 rows a device .* bytes of scalar memory.*'blocked'"):
        jax.eval_shape(lambda q, k, v: jax.grad(lambda q: jnp.sum(
            tpu_attention(Call(q, k, v, whole_row(16, 131072), c.Full(), 0.1))[0].astype(jnp.float32)
        ))(q), *args)  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("length", "kernels"), [(40 * 512, 1), (310 * 512, 2)])
def test_where_the_plan_of_one_backward_kernel_is_too_long_two_take_its_place(length, kernels):
    """Six numbers a step against four: 310 blocks without a window have 48,205 steps, and 1,157 KB against 771 KB."""
    x, place = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16), whole_row(1, length)

    def total(q, k, v):
        call = Call(q, k, v, place, c.Full(), 0.1)
        return jnp.sum(tpu_attention(call, blocks=Blocks(512, 512, 128), waiting=2**40)[0].astype(jnp.float32))

    assert len(calls(jax.grad(total, argnums=(0, 1, 2)), x, x, x)) == 1 + kernels


@pytest.mark.quick
def test_blocks_fit_the_row_and_the_memory():
    assert block_sizes(c.Full(), 8192) == (1024, 1024, 128)
    assert block_sizes(c.Full(), 1100) == (640, 640, 128)  # not 2048 in all
    assert block_sizes(c.Windowed(512), 32768)[:2] == (512, 512) and block_sizes(c.Windowed(9), 32768)[:2] == (256, 256)
    assert block_sizes(c.Full(), 8192, width_bytes=1024) == (512, 512, 128)
    assert block_sizes(c.Full(), 5) == (128, 128, 128)


HARD = {
    "large logits": lambda q, k, v: (100 * q, 100 * k, v),
    "all equal": lambda q, k, v: (jnp.ones_like(q), jnp.ones_like(k), v),
    "one key far above": lambda q, k, v: (q, k.at[:, 5].multiply(1e3), v),
    "random": lambda q, k, v: (q, k, v),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_errors_against_float64_are_those_of_xlas_attention(name, dtype):
    settings = {"pattern": c.Windowed(40), "scale": 0.25}
    runs = {
        implementation: jax.jit(functools.partial(windowed_attention, **settings, implementation=implementation))
        for implementation in ("pallas_tpu", "reference")
    }
    errors: dict[str, list[float]] = {implementation: [] for implementation in runs}
    for seed in range(5):
        given = [x.astype(dtype) for x in HARD[name](*draw(seed, 1, 128, 2, 1, 16, 16))]
        with jax.enable_x64(True):
            exact_inputs = [jnp.asarray(np.asarray(x, np.float64)) for x in given]
            exact = np.asarray(windowed_attention(*exact_inputs, **settings, implementation="reference")[0])
        for implementation, run in runs.items():
            out = np.asarray(run(*given)[0], np.float64)
            np.testing.assert_array_equal(out, np.asarray(run(*given)[0], np.float64))  # the same bits again
            errors[implementation].append(np.sqrt(np.mean(np.square(out - exact)) / np.mean(np.square(exact))))
    # Both round scores and products; which of two roundings is the luckier one is chance.
    assert np.mean(errors["pallas_tpu"]) <= 1.5 * np.mean(errors["reference"]) + np.finfo(np.float32).eps, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_gradients_of_hard_inputs_are_as_exact_as_those_of_plain_jax(name):
    """float32, against float64. Gradients of queries and keys only where they are not differences of equal numbers."""
    settings = {"pattern": c.Windowed(40), "scale": 0.25}

    def differentiate(implementation):
        def total(q, k, v, dout):
            return jnp.sum(windowed_attention(q, k, v, **settings, implementation=implementation)[0] * dout)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))

    runs = {implementation: differentiate(implementation) for implementation in ("pallas_tpu", "blocked")}
    errors: dict[str, list[list[float]]] = {implementation: [] for implementation in runs}
    for seed in range(5):
        given = *HARD[name](*draw(seed, 1, 128, 2, 1, 16, 16)), jax.random.normal(fresh_key(50 + seed), (1, 128, 2, 16))
        with jax.enable_x64(True):
            exact = differentiate("reference")(*(jnp.asarray(np.asarray(x, np.float64)) for x in given))
        for implementation, run in runs.items():
            pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(run(*given), exact, strict=True)]
            errors[implementation].append([float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in pairs])
    ours, plain = (np.mean(errors[name], axis=0) for name in ("pallas_tpu", "blocked"))
    compared = slice(None) if name == "random" else slice(2, None)
    assert np.all(ours[compared] <= 1.5 * plain[compared] + 2 * np.finfo(np.float32).eps), (ours, plain)


def test_rows_that_see_nothing_give_zeros_minus_infinity_and_no_gradient():
    q, k, v = draw(1, 1, 140, 2, 2, 8, 8)
    place = Place(jnp.arange(140)[None], jnp.where(jnp.arange(140) < 3, 1, 0)[None])
    gradients, (out, lse) = attend(BLOCKS[0], place, c.Full(), q, k, v)
    np.testing.assert_array_equal(out[:, 3:], 0)
    assert np.all(np.isneginf(lse[:, :, 3:])) and np.all(np.isfinite(lse[:, :, :3]))
    assert_close(out[:, 0], v[:, 0], 1e-6)  # one key
    for gradient in gradients:
        assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[:, 3:])


@pytest.mark.parametrize(
    ("heads", "keys"), [(4, 2), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_devices_work_on_their_own_part_and_give_what_one_gives(heads, keys):
    """One key head is repeated for two devices. Three query heads cannot be split: each device has all."""
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
    assert "fsdp" in spec[0] and (heads == 3 or "model" in spec[2]), spec


@pytest.mark.quick
def test_float16_is_refused_by_name_and_passed_over_by_default(monkeypatch):
    q, k, v = draw(0, 1, 8, 1, 1, 8, 8, jnp.float16)
    with pytest.raises(c.ConfigError, match="implementation='pallas_tpu': TPUs have no float16; use bfloat16"):
        windowed_attention(q, k, v, pattern=c.Full(), scale=1.0, implementation="pallas_tpu")
    assert api.default_implementation(call_of(jnp.bfloat16)) == "blocked"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert api.default_implementation(call_of(jnp.bfloat16)) == "pallas_tpu"
    assert api.default_implementation(call_of(jnp.float16)) == "blocked"
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(device_kind="TPU v4")])
    assert "more vector memory; this is a TPU v4" in (api.refusal("pallas_tpu", call_of(jnp.bfloat16)) or "")
    assert api.default_implementation(call_of(jnp.bfloat16)) == "blocked"
