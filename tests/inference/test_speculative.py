"""Speculative decoding gives what the model alone gives: greedy the same tokens, sampling the same distribution."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.inference import acceptance, speculative
from dsv3_jax.inference.generation import NO_TOKEN, Generator
from dsv3_jax.inference.sampling import make_sampling, probabilities
from dsv3_jax.inference.speculative import Counts, SpeculativeGenerator
from dsv3_jax.models.transformer import Transformer, head_weight
from tests.conftest import tiny_model
from tests.inference.test_acceptance import SIGNIFICANCE, p_value
from tests.inference.test_generation import weights

BFLOAT16 = 2**-6  # of the largest logit: two layers, each with a few roundings of 2^-9
VOCABULARY = 7  # so few tokens that some drafts of a random model are right
LENGTH = 24  # of the context; the longest prompt leaves one bucket for all calls: programs are compiled once
PROMPTS = [[5, 6, 1], [4], [2, 3, 1, 1, 0, 5, 6, 2, 4, 3, 3, 1, 0, 0, 5, 2, 6], [5, 6, 1], [0, 2]]
TURNS = "patterns in turn, windows and conditions of tasks, depth 3"
CHOICES = "learned tokens, sinks, a mass of experts that attend to each other, depth 2"
DENSE = "grouped query, full, dense, tied, depth 2"
TASKS = (c.TaskWindow("short", 2), c.TaskWindow("long", 7))
small = functools.partial(tiny_model, vocab_size=VOCABULARY, context_length=LENGTH)
MODELS = {
    "latent, windows, experts, depth 1": small(mtp=c.MultiToken(depth=1)),
    DENSE: small(
        attention=c.Attention(projection=c.GroupedQuery(4, 2, 8), pattern=c.Full()),
        num_dense_layers=2,
        moe=None,
        tie_embeddings=True,
        mtp=c.MultiToken(depth=2),
    ),
    TURNS: small(
        attention=c.Attention(
            projection=c.GroupedQuery(2, 1, 8),
            pattern=c.PerLayer((c.RuntimeWindowed(8, (0,), TASKS), c.RuntimeWindowed(4, (), TASKS), c.Segmented(5))),
        ),
        moe=c.MixtureOfExperts(
            num_experts=4, expert_dim=16, router=c.Softmax(), condition=c.Condition(("long", "other"), 4)
        ),
        mtp=c.MultiToken(depth=3),
    ),
    CHOICES: small(
        attention=c.Attention(
            projection=c.GroupedQuery(2, 1, 8), pattern=c.LearnedGlobal(window=4, stride=2, top_k=2), sinks=True
        ),
        moe=c.MixtureOfExperts(
            num_experts=4,
            expert_dim=16,
            router=c.ProbabilityMass(k_min=2, k_max=3, target_k=2.5),
            combination=c.CrossExpertAttention(num_heads=2, head_dim=8),
        ),
        mtp=c.MultiToken(depth=2),
    ),
}
SLOW = (TURNS, CHOICES)
FAST = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]


@pytest.mark.quick
def test_counts_say_what_was_accepted():
    assert str(Counts(4, 3, 2, 5)) == "3 of 4 drafts accepted (75.0%), 2.50 tokens a round"
    assert str(Counts(rounds=2, tokens=2)) == "no drafts were needed"  # the last token of a row needs none


@pytest.mark.quick
def test_rows_that_are_ahead_wait_for_the_others():
    waiting = [[1, 2, 3], [4], [5, 6]]
    steps = [speculative._columns(waiting, np.asarray([False, False, True])).tolist()]
    waiting[1] += [7, 8, 9]
    steps += [speculative._columns(waiting, np.asarray([False, False, True])).tolist()]
    steps += [speculative._columns(waiting, np.asarray([True, True, True])).tolist()]
    assert steps == [[[1], [4], [5]], [[2, 3], [7, 8], [6, NO_TOKEN]], [[NO_TOKEN], [9], [NO_TOKEN]]]


@pytest.fixture(scope="module", params=FAST)
def made(request):
    """The depth, both generators, and the drafts that modules make of a text without any cache."""
    config = MODELS[request.param]
    assert config.mtp is not None
    variables, depth = weights(config), config.mtp.depth
    if config.moe is not None and config.moe.condition is not None:  # starts at zero
        w_condition = variables["params"]["moe_layers"]["moe"]["w_condition"]
        variables["params"]["moe_layers"]["moe"]["w_condition"] = jax.random.normal(
            jax.random.key(1), w_condition.shape
        )
    model: Any = Transformer(config)
    head_DV = head_weight(config, variables["params"])

    @jax.jit
    def drafts(text_T: jax.Array, length: jax.Array) -> jax.Array:
        text_T = jnp.pad(text_T, (0, depth + 1))
        x_BTD = model.apply(variables, text_T[None, :LENGTH]).hidden_BTD
        for k in range(depth):
            x_BTD, normed_BTD, _ = model.apply(
                variables, k, x_BTD, text_T[None, k + 1 : k + 1 + LENGTH], method="predict"
            )
            text_T = text_T.at[length + k + 1].set(jnp.argmax(normed_BTD[0, length - 1] @ head_DV))
        return jax.lax.dynamic_slice_in_dim(text_T, length + 1, depth)

    return depth, Generator(config, variables), SpeculativeGenerator(config, variables), drafts


def naive_counts(drafts, depth: int, prompt: list[int], greedy: list[int]) -> np.ndarray:
    """Drafted, accepted, rounds and tokens of one row, when the model would choose `greedy`."""
    total, made = np.zeros(4, int), 1
    while made < len(greedy):
        ids = np.asarray(prompt + greedy[:made], np.int32)
        proposed = min(depth, len(greedy) - made - 1)
        right = np.asarray(drafts(np.pad(ids, (0, LENGTH - len(ids))), len(ids) - 1)) == np.asarray(
            [*greedy[made:], *[-1] * depth][:depth]
        )
        accepted = int(np.cumprod(right[:proposed]).sum())
        total += np.asarray([proposed, accepted, 1, accepted + 1])
        made += accepted + 1
    return total


def generate(generator: Generator, count: int = LENGTH, stop: int = VOCABULARY, task: str = "") -> list[list[int]]:
    """To the end of the context, or up to a stop id, which here is no token."""
    return generator.generate(PROMPTS, max_new_tokens=count, stop_ids={stop}, task=task)


def test_greedy_is_the_model_alone_and_the_drafts_are_those_made_without_a_cache(made):
    depth, plain, drafting, drafts = made
    expected = generate(plain)
    assert generate(drafting) == expected
    assert [len(row) for row in expected] == [LENGTH - len(prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) >= 3
    rows = [naive_counts(drafts, depth, prompt, row) for prompt, row in zip(PROMPTS, expected, strict=True)]
    counts = drafting.counts
    assert counts == Counts(*np.sum(rows, axis=0).tolist())
    assert 0 < counts.accepted < counts.drafted and counts.tokens == sum(len(row) - 1 for row in expected)
    assert counts.acceptance_rate == counts.accepted / counts.drafted
    assert counts.tokens_a_round == counts.tokens / counts.rounds > 1


def test_every_draft_is_the_one_made_without_a_cache(made, monkeypatch):
    """Those that were rejected too; what replaced one stands in its place."""
    depth, _, drafting, drafts = made
    rounds, seen = drafting._jit_rounds, []

    def spy(variables, state, *rest):
        length_B, live_B = np.asarray(state.cache.length_B), ~np.asarray(state.done_B)
        state, given = rounds(variables, state, *rest)
        seen.append((length_B, live_B, *map(np.asarray, (state.cache.length_B, state.text_BX, state.first_B))))
        return state, given

    monkeypatch.setattr(drafting, "_jit_rounds", spy)
    list(drafting.stream(PROMPTS, max_new_tokens=LENGTH, stop_ids={VOCABULARY}))
    checked = 0
    for length_B, live_B, after_B, text_BX, first_B in seen:
        for row in np.flatnonzero(live_B):
            length, accepted = length_B[row], after_B[row] - length_B[row] - 1
            again = depth + int(accepted == depth)  # positions that the modules run on in the next round
            assert first_B[row] == max(after_B[row] - again, 0)
            known_T = np.where(np.arange(LENGTH) <= length, text_BX[row, :LENGTH], 0).astype(np.int32)
            different = np.asarray(drafts(known_T, length)) != text_BX[row, length + 1 : length + 1 + depth]
            assert not np.delete(different, np.arange(accepted, min(accepted + 1, depth))).any()
            checked += depth - 1 + int(accepted == depth)
    assert checked > 5


def test_rows_end_at_stop_ids_and_budgets_each_by_itself(made):
    _, plain, drafting, _ = made
    free = generate(plain)
    stop = free[2][4]
    expected = generate(plain, stop=stop)
    assert generate(drafting, stop=stop) == expected != free
    for budget in (1, 2, 3, 4, 5):  # ends in every place of a round
        assert generate(drafting, budget) == [row[:budget] for row in free]
    assert drafting._jit_begin._cache_size() == drafting._jit_rounds._cache_size() == 1


def test_streaming_gives_the_same_tokens_in_columns(made):
    _, plain, drafting, _ = made
    stop = generate(plain)[2][4]
    expected = generate(plain, stop=stop)
    steps = list(drafting.stream(PROMPTS, max_new_tokens=LENGTH, stop_ids={stop}))
    assert len(steps) > 1
    tokens_BN = np.concatenate(steps, axis=1)
    assert tokens_BN.shape[1] == max(map(len, expected))
    for tokens_N, row in zip(tokens_BN, expected, strict=True):  # NO_TOKEN after the end alone
        assert tokens_N[: len(row)].tolist() == row and (tokens_N[len(row) :] == NO_TOKEN).all()


@pytest.mark.parametrize("made", [pytest.param(TURNS, marks=pytest.mark.slow)], indirect=True)
def test_a_task_holds_in_prefill_rounds_and_modules(made):
    _, plain, drafting, _ = made
    rows = {task: generate(plain, task=task) for task in ("", "short", "other")}
    assert all(generate(drafting, task=task) == row for task, row in rows.items())
    assert rows[""] != rows["short"] and rows[""] != rows["other"]
    with pytest.raises(c.ConfigError, match="--task=far: .* tasks: short, long, other"):
        generate(drafting, task="far")


@pytest.mark.slow
def test_bfloat16_gives_best_tokens_up_to_rounding():
    """One token at a time and several at a time round differently, so that texts may part at a near tie. What holds:
    each token is the best after those before it, up to rounding, and rows and counts are complete. A dense model: where
    rounding changes a choice of experts, logits jump."""
    config = dataclasses.replace(MODELS[DENSE], compute_dtype="bfloat16")
    variables, model = weights(config), cast(Any, Transformer(config))
    logits: Any = jax.jit(lambda tokens_BT: model.apply(variables, tokens_BT).logits_BTV)
    drafting = SpeculativeGenerator(config, variables)
    rows = generate(drafting)
    assert generate(drafting) == rows
    assert [len(row) for row in rows] == [LENGTH - len(prompt) for prompt in PROMPTS]
    counts = drafting.counts
    assert 0 < counts.accepted < counts.drafted and counts.tokens == sum(len(row) - 1 for row in rows)
    texts_BT = np.asarray([prompt + row for prompt, row in zip(PROMPTS, rows, strict=True)])
    logits_BTV = np.asarray(logits(texts_BT))
    behind, runner_up = [], []
    for text_T, logits_TV, prompt in zip(texts_BT, logits_BTV, PROMPTS, strict=True):
        for at in range(len(prompt), LENGTH):
            best_V, scale = np.sort(logits_TV[at - 1]), np.abs(logits_TV[at - 1]).max()
            behind.append((best_V[-1] - logits_TV[at - 1, text_T[at]]) / scale)
            runner_up.append((best_V[-1] - best_V[-2]) / scale)
    assert max(behind) <= BFLOAT16 < np.median(runner_up) / 2


@pytest.mark.quick
def test_a_model_without_modules_is_refused():
    config = small()
    with pytest.raises(c.ConfigError, match="--draft=mtp: this model has no multi-token-prediction modules"):
        SpeculativeGenerator(config, {})


# Sampling.


ROWS, PROMPT = 2048, [3, 1, 5]


@pytest.fixture(scope="module")
def sampled():
    """A generator that drafts, settings, and the exact probabilities of the first four tokens after a prompt."""
    config = dataclasses.replace(MODELS[DENSE], vocab_size=6, num_layers=1, num_dense_layers=1)
    variables, how, V = weights(config), make_sampling(1.3, top_p=0.95), 6

    @jax.jit
    def chances(texts_BT: jax.Array) -> jax.Array:
        model: Any = Transformer(config)
        logits_BTV = model.apply(variables, texts_BT).logits_BTV[:, len(PROMPT) - 1 :]
        return jax.vmap(lambda logits_BV: probabilities(logits_BV, how), 1, 1)(logits_BTV)

    after = np.indices((V, V, V)).reshape(3, -1).T  # every three tokens
    p = chances(np.concatenate([np.broadcast_to(PROMPT, (len(after), len(PROMPT))), after], axis=1))
    p = np.asarray(p, np.float64).reshape(V, V, V, 4, V)  # of the token at each of four places after them
    first, second = p[0, 0, 0, 0][:, None, None, None], p[:, 0, 0, 1][:, :, None, None]
    joint = first * second * p[:, :, 0, 2][..., None] * p[..., 3, :]
    return SpeculativeGenerator(config, variables), how, joint


def pair_p_values(generator: SpeculativeGenerator, how, joint: np.ndarray) -> list[float]:
    """Of the counts of two tokens that follow each other, at each place of the first four."""
    rows_BN = np.asarray(generator.generate([PROMPT] * ROWS, max_new_tokens=4, sampling=how, seed=1))
    values = []
    for place, others in enumerate([(2, 3), (0, 3), (0, 1)]):
        counts = np.zeros(joint.shape[:2], int)
        np.add.at(counts, tuple(rows_BN[:, place : place + 2].T), 1)
        values.append(p_value(counts, joint.sum(others)))
    return values


def test_sampled_texts_are_distributed_as_the_models(sampled):
    generator, how, joint = sampled
    np.testing.assert_allclose(joint.sum(), 1, rtol=1e-5)
    assert min(pair_p_values(generator, how, joint)) > SIGNIFICANCE
    assert 0.2 < generator.counts.acceptance_rate < 0.95


@pytest.mark.slow
def test_a_wrong_rule_would_be_seen_in_texts(sampled, monkeypatch):
    generator, how, joint = sampled
    monkeypatch.setattr(acceptance, "acceptance", lambda p, q: jnp.where(p > 0, 1.0, 0.0))
    wrong = SpeculativeGenerator(generator.config, generator._variables)
    assert min(pair_p_values(wrong, how, joint)) < 1e-10


def test_a_row_draws_the_same_in_any_batch_and_any_number_of_rounds_a_call(sampled):
    generator, how, _ = sampled
    options: Any = {"max_new_tokens": 6, "sampling": how}
    first = generator.generate([PROMPT] * ROWS, seed=2, **options)
    others = generator.stream([PROMPT, [5, 4], *[[0]] * (ROWS - 2)], seed=2, **options)
    rows_BN = np.concatenate(list(others), axis=1)
    assert rows_BN[0].tolist() == first[0] and (rows_BN != np.asarray(first)).any(axis=1).mean() > 0.9
    assert generator.generate([PROMPT] * ROWS, seed=3, **options) != first
    assert len(set(map(tuple, first))) > ROWS / 10  # rows draw apart
