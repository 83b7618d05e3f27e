"""Counts by formula against counts in XLA's program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax import config as c
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.planning.flops import count_parameters, forward_flops
from dsv3_jax.planning.hlo import count_flops
from tests.conftest import tiny_model

T = 64


def compiled_flops(config: c.ModelConfig) -> float:
    """XLA's dots in a forward pass, per token."""
    model, tokens = Transformer(config), jax.ShapeDtypeStruct((1, T), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    count = count_flops(jax.jit(model.apply).lower(variables, tokens).compile().as_text())
    assert count.unknown_loops == 0
    return count.flops / T


def plain(projection: c.Projection, **changes) -> c.ModelConfig:
    """Attention over the whole matrix and every expert on every token: XLA then does just what a formula can say."""
    attention = c.Attention(projection=projection, pattern=c.Full(), implementation="reference")
    moe = dataclasses.replace(tiny_model().moe, dispatch=c.DenseDispatch())
    return tiny_model(attention=attention, moe=moe, num_layers=4, **changes)


@pytest.mark.parametrize("projection", [c.GroupedQuery(4, 2, 8), tiny_model().attention.projection], ids=str)
def test_formula_and_xla_agree_scanned_and_unrolled(projection):
    config = plain(projection)
    parts = forward_flops(config, T)
    # The oracle's programs do more: all keys, and all experts.
    parts["attention scores and values"] *= T / ((T + 1) / 2)
    parts["routed experts"] *= config.moe.num_experts / config.moe.router.top_k
    expected = sum(parts.values())
    unrolled, scanned = (compiled_flops(dataclasses.replace(config, unroll=flag)) for flag in (True, False))
    assert unrolled == pytest.approx(scanned, rel=1e-6)
    # The one-hot products of routing and combination are not in the formula.
    assert expected <= unrolled < 1.08 * expected


@pytest.mark.parametrize("pattern", [c.LearnedGlobal(8, 8, 4), c.Sparse(16, 4, 16)], ids=str)
def test_learned_parts_of_patterns_are_counted(pattern):
    full = plain(tiny_model().attention.projection)
    config = dataclasses.replace(full, attention=dataclasses.replace(full.attention, pattern=pattern))
    learned = forward_flops(config, T)["learned patterns"]
    if isinstance(pattern, c.Sparse):  # the oracle scores every key
        H, N = 4, 16
        learned += 2 * 4 * H * (N + 1) * (T - (T + 1) / 2)
        assert forward_flops(config, T)["attention scores and values"] == 2 * 4 * 2 * (16 + 8) * (16 * 49 + 120) / T
    # What the pattern adds to the program: sparse attention also computes its scores a second time, for the loss.
    added = compiled_flops(config) - compiled_flops(full)
    again = 0 if isinstance(pattern, c.LearnedGlobal) else 2 * 4 * 2 * 16 * T
    assert learned <= added + 1 and added <= 1.08 * (learned + again) + 1


@pytest.mark.quick
def test_layers_with_their_own_patterns_add_up():
    def keys(pattern):
        config = tiny_model(attention=c.Attention(pattern=pattern), num_layers=5)
        return forward_flops(config, T)["attention scores and values"] / 5

    cycle = c.PerLayer((c.Windowed(4), c.Full()))
    assert keys(cycle) == pytest.approx((3 * keys(c.Windowed(4)) + 2 * keys(c.Full())) / 5)


@pytest.mark.quick
def test_a_loop_counts_its_trips():
    def looped(x, w):
        return jax.lax.fori_loop(0, 7, lambda i, x: x @ w, x)

    shapes = jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count_flops(jax.jit(looped).lower(*shapes).compile().as_text()).flops == 7 * 2 * 4**3

    def unknown(x, w, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)

    count = count_flops(jax.jit(unknown).lower(*shapes, jnp.int32(0)).compile().as_text())
    assert count == (0.0, 1)


@pytest.mark.quick
def test_window_costs_less_and_counts_parameters_alike():
    full, window = (tiny_model(attention=c.Attention(pattern=p)) for p in (c.Full(), c.Windowed(4)))
    assert sum(forward_flops(window, 256).values()) < sum(forward_flops(full, 256).values())
    assert count_parameters(full) == count_parameters(window)
    count = count_parameters(tiny_model())
    moe = tiny_model().moe
    assert count.total - count.active == 3 * 32 * 16 * (moe.num_experts - moe.router.top_k)
