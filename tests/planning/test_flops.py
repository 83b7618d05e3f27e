"""Counts by formula against counts in XLA's program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.models.transformer import Transformer, summed_loss
from dsv3_jax.planning.flops import count_parameters, forward_flops, prediction_flops, training_flops
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


def with_moe(config: c.ModelConfig, **changes) -> c.ModelConfig:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def added_by(config: c.ModelConfig, plain: c.ModelConfig) -> tuple[dict[str, float], float]:
    """What a config adds to another: by part in the formula, and in XLA's programs."""
    before, after = forward_flops(plain, T), forward_flops(config, T)
    return {name: after[name] - before.get(name, 0) for name in after}, compiled_flops(config) - compiled_flops(plain)


@pytest.mark.parametrize("moe", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_multi_token_prediction_is_counted(moe):
    """A training forward pass with two modules against one without, each with its losses."""
    base = plain(c.GroupedQuery(4, 2, 8))
    base = dataclasses.replace(base, num_layers=1, num_dense_layers=0 if moe else 1, moe=base.moe if moe else None)
    config = dataclasses.replace(base, mtp=c.MultiToken(2))

    def loss_flops(model: c.ModelConfig) -> float:
        batch = {name: jax.ShapeDtypeStruct((1, T), jnp.int32) for name in ("tokens", "targets", "positions")}
        batch |= {name: jax.ShapeDtypeStruct((1, T), jnp.int32) for name in ("segment_ids", "domain")}
        variables = jax.eval_shape(Transformer(model).init, jax.random.key(0), batch["tokens"])
        variables = nn.unbox(variables)
        loss = functools.partial(summed_loss, c.Config(model=model), predict_ahead=model.mtp is not None)
        count = count_flops(jax.jit(loss).lower(variables, batch).compile().as_text())
        assert count.unknown_loops == 0
        return count.flops / T

    again = 0.0  # the oracle's programs do more in each module: all keys, and all experts
    parts = forward_flops(base, T)
    again += 2 * parts["attention scores and values"] * (T / ((T + 1) / 2) - 1)
    if moe:
        again += 2 * parts["routed experts"] * (base.moe.num_experts / base.moe.router.top_k - 1)
    expected, added = prediction_flops(config, T) + again, loss_flops(config) - loss_flops(base)
    assert expected <= added + 1 and added < 1.08 * expected + 1
    assert training_flops(config, T) == training_flops(base, T) + 3 * prediction_flops(config, T)
    assert count_parameters(config).active == count_parameters(base).active < count_parameters(config).total


def test_deep_experts_are_counted():
    base = dataclasses.replace(plain(c.GroupedQuery(4, 2, 8)), num_layers=2)
    n, H, N = 2, 2, 8
    config = with_moe(base, expert=c.DeepExpert(n, H, N))
    parts, added = added_by(config, base)
    moe, k = config.moe, config.moe.router.top_k
    E, F = moe.num_experts, moe.expert_dim
    one_expert = 2 * n * (4 * config.dim * H * N + 3 * config.dim * F)
    assert forward_flops(config, T)["routed experts"] == k * one_expert
    # Of T tokens an expert has k / E; a query sees itself and, of the earlier ones, that share.
    assert parts["attention in experts"] == pytest.approx(2 * k * n * 2 * H * N * (1 + (T - 1) / 2 * k / E))
    # The oracle runs all experts, on all tokens and over all keys.
    oracle = E * (one_expert + 2 * n * 2 * H * N * T) - 2 * E * 3 * config.dim * F
    assert added == pytest.approx(oracle, rel=0.02)  # the one-hot products of both


def test_cross_expert_attention_condition_and_unit_gate_are_counted():
    base = dataclasses.replace(plain(c.GroupedQuery(4, 2, 8)), num_layers=2)
    gate = c.UnitGate(blocks=8, gate_dim=8, target=0.25)
    config = with_moe(base, combination=c.CrossExpertAttention(2, 16), condition=c.Condition(("code",), 16))
    config = dataclasses.replace(config, unit_gate=gate)
    parts, added = added_by(config, base)
    # The program multiplies by units that are off too.
    off = 3 * (parts.pop("dense MLP") + parts.pop("shared experts"))
    whole = forward_flops(base, T)
    assert off == -3 * 0.75 * (whole["dense MLP"] + whole["shared experts"])
    assert set(name for name, value in parts.items() if value) == {"router", "cross-expert attention", "unit gate"}
    # Besides, the oracle picks each token's outputs by a one-hot product.
    D, E, F, k = config.dim, config.moe.num_experts, config.moe.expert_dim, config.moe.router.top_k
    assert sum(parts.values()) <= added + 1, (parts, added)
    assert added <= sum(parts.values()) + 2 * k * E * (D + F)


@pytest.mark.quick
def test_widths_and_mass_count_as_the_mean():
    base = with_moe(tiny_model(), num_shared_experts=0)
    narrow = with_moe(base, expert_dim=12)
    assert forward_flops(with_moe(base, expert=c.FeedForward((16, 8))), T) == forward_flops(narrow, T)
    assert count_parameters(with_moe(base, expert=c.FeedForward((16, 8)))).active == count_parameters(narrow).active
    # Experts 0, 3 and 6 have 16 units, 1, 4 and 7 have 8, 2 and 5 have 4.
    uneven = with_moe(base, expert=c.FeedForward((16, 8, 4)))
    assert forward_flops(uneven, T)["routed experts"] == 2 * 2 * 3 * 32 * (3 * 16 + 3 * 8 + 2 * 4) / 8
    assert count_parameters(uneven).total == count_parameters(base).total, "all are stored at the widest"

    three = with_moe(base, router=c.Softmax(top_k=3))
    mass = with_moe(base, router=c.ProbabilityMass(k_min=1, k_max=5, target_k=3.0))
    assert forward_flops(mass, T) == forward_flops(three, T)
    assert count_parameters(mass) == count_parameters(three)


@pytest.mark.quick
def test_active_parameters_of_deep_experts_and_gated_units():
    base = tiny_model()
    deep = with_moe(base, expert=c.DeepExpert(2, 2, 8))
    one = 2 * (4 * 32 * 16 + 3 * 32 * 16 + 2 * 32)  # an expert's two layers, norms included
    count, plain_count = count_parameters(deep), count_parameters(base)
    assert count.total - plain_count.total == 8 * (one - 3 * 32 * 16)
    assert count.total - count.active == 6 * one
    gate = c.UnitGate(blocks=8, gate_dim=4, target=0.25)
    count, own = count_parameters(dataclasses.replace(base, unit_gate=gate)), 2 * (32 * 4 + 4 * 8 + 8)
    assert count.total == plain_count.total + own
    assert count.active == plain_count.active + own - 0.75 * 3 * 32 * (64 + 16)


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
