"""Generation equals a naive loop that runs the whole text through the model for each token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.inference.generation import NO_TOKEN, Generator, bucket, compute_weights
from dsv3_jax.inference.sampling import allowed_logits, make_sampling, row_keys
from dsv3_jax.models.stack import unstack_layers
from dsv3_jax.models.transformer import Transformer, make_cache
from tests.conftest import tiny_model

LENGTH = 48
LATENT = tiny_model(context_length=LENGTH)
GROUPED = tiny_model(
    attention=c.Attention(projection=c.GroupedQuery(4, 2, 8), pattern=c.Full()),
    num_dense_layers=2,
    moe=None,
    tie_embeddings=True,
    context_length=LENGTH,
)
MODELS = {"latent, windows, experts": LATENT, "grouped query, full, dense, tied": GROUPED}
PROMPTS = [[5, 6, 7], [8], list(range(10, 31)), [5, 6, 7]]


def weights(config: c.ModelConfig) -> dict:
    """Larger than at the start of training, so that the most probable tokens are far apart and differ by position."""
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, variables)


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """Config, variables, a generator, and the logits of a whole text at one of its positions."""
    config = MODELS[request.param]
    variables = weights(config)
    forward = jax.jit(lambda tokens_BT: Transformer(config).apply(variables, tokens_BT).logits_BTV)

    def logits_after(ids: list[int]) -> jax.Array:
        tokens_T = np.zeros(LENGTH, np.int32)
        tokens_T[: len(ids)] = ids
        return forward(tokens_T[None])[0, len(ids) - 1]

    return config, variables, Generator(config, variables), logits_after


def naive(logits_after, prompt, count, choose=lambda logits, step: int(jnp.argmax(logits)), stop_ids=()) -> list[int]:
    ids = list(prompt)
    for step in range(count):
        token = choose(logits_after(ids), step)
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_equals_the_naive_loop_for_prompts_of_unequal_length(made):
    _, _, generator, logits_after = made
    actual = generator.generate(PROMPTS, max_new_tokens=20)
    assert actual == [naive(logits_after, prompt, 20) for prompt in PROMPTS]
    assert len(set(map(tuple, actual))) >= 3  # the texts do differ


def test_sampling_equals_the_naive_loop(made):
    _, _, generator, logits_after = made
    settings = make_sampling(temperature=0.8, top_k=20, top_p=0.9)
    actual = generator.generate(PROMPTS, max_new_tokens=12, sampling=settings, seed=3)
    for row, (prompt, row_key) in enumerate(zip(PROMPTS, row_keys(3, 4), strict=True)):

        def choose(logits, step, key=row_key):
            allowed = allowed_logits(logits[None], settings)[0]
            return int(jax.random.categorical(jax.random.fold_in(key, step), allowed))

        assert actual[row] == naive(logits_after, prompt, 12, choose)
    assert actual[0] != actual[3]  # same prompt, another row
    again = generator.generate(PROMPTS, max_new_tokens=12, sampling=settings, seed=4)
    assert again != actual


def test_streaming_gives_the_same_tokens_one_at_a_time(made):
    _, _, generator, _ = made
    expected = generator.generate(PROMPTS, max_new_tokens=20)
    steps = list(generator.stream(PROMPTS, max_new_tokens=20))
    assert {step.shape for step in steps} == {(4, 1)}
    assert np.concatenate(steps, axis=1).tolist() == expected


def test_rows_end_at_stop_ids_each_by_itself(made):
    _, _, generator, logits_after = made
    free = generator.generate(PROMPTS, max_new_tokens=20)
    stop_ids = {free[0][4], free[2][0]}
    actual = generator.generate(PROMPTS, max_new_tokens=20, stop_ids=stop_ids)
    assert actual == [naive(logits_after, prompt, 20, stop_ids=stop_ids) for prompt in PROMPTS]
    assert actual[2] == [] and len(actual[0]) <= 4
    steps = list(generator.stream(PROMPTS, max_new_tokens=20, stop_ids=stop_ids))
    rows = np.concatenate(steps, axis=1)
    assert [row[row != NO_TOKEN].tolist() for row in rows] == actual
    assert len(steps) == max(map(len, actual))


@pytest.mark.quick
def test_the_context_is_never_overrun():
    generator = Generator(GROUPED, weights(GROUPED), max_length=20)
    prompts = [list(range(3, 20)), [5, 6]]
    assert generator.room(prompts, 100) == [3, 18]
    rows = generator.generate(prompts, max_new_tokens=100)
    assert [len(row) for row in rows] == [3, 18]
    with pytest.raises(c.ConfigError, match="has 20 tokens, and the context holds 20"):
        generator.stream([[5] * 20], max_new_tokens=1)
    with pytest.raises(c.ConfigError, match="has token 320, and the model knows 0 to 319"):
        generator.stream([[5], [6, 320]], max_new_tokens=1)
    with pytest.raises(c.ConfigError, match="has token -1, and the model knows 0 to 319"):
        generator.stream([[5], np.asarray([6, -1])], max_new_tokens=1)
    with pytest.raises(c.ConfigError, match="steps_a_call=0: must be at least 1"):
        generator.stream([[5]], max_new_tokens=1, steps_a_call=0)
    with pytest.raises(c.ConfigError, match="is empty"):
        generator.stream([[5], []], max_new_tokens=1)
    with pytest.raises(c.ConfigError, match="--max_new_tokens=0"):
        generator.stream([[5]], max_new_tokens=0)
    assert Generator(GROUPED, weights(GROUPED), max_length=1000).max_length == LENGTH


def test_one_program_serves_all_prompts_of_a_bucket(made):
    config, variables, _, _ = made
    generator = Generator(config, variables)
    for prompts in (PROMPTS, [[1] * 20, [2], [3], [4]]):
        generator.generate(prompts, max_new_tokens=10)
        list(generator.stream(prompts, max_new_tokens=8))
    assert generator._jit_prefill._cache_size() == 1 and generator._jit_decode._cache_size() == 1


def test_a_row_does_not_depend_on_the_others(made):
    _, _, generator, _ = made
    settings = make_sampling(temperature=1.0)
    together = generator.generate(PROMPTS, max_new_tokens=6, sampling=settings)
    others = [PROMPTS[0], [99] * 21, [1], [2]]
    assert generator.generate(others, max_new_tokens=6, sampling=settings)[0] == together[0]


def test_the_window_of_a_task_holds_in_prefill_and_decoding():
    pattern = c.RuntimeWindowed(8, tasks=(c.TaskWindow("short", 2),))
    config = tiny_model(attention=dataclasses.replace(LATENT.attention, pattern=pattern))
    variables = weights(config)
    fixed = {
        window: dataclasses.replace(config, attention=dataclasses.replace(LATENT.attention, pattern=c.Windowed(window)))
        for window in (2, 8)
    }
    expected = {w: Generator(model, variables).generate(PROMPTS, max_new_tokens=9) for w, model in fixed.items()}
    generator = Generator(config, variables)
    assert generator.generate(PROMPTS, max_new_tokens=9, task="short") == expected[2]
    assert generator.generate(PROMPTS, max_new_tokens=9) == expected[8] != expected[2]
    assert generator._jit_decode._cache_size() == 1
    with pytest.raises(c.ConfigError, match="--task=long: .* no window and no router condition for it; tasks: short"):
        generator.stream(PROMPTS, max_new_tokens=9, task="long")
    with pytest.raises(c.ConfigError, match="--task=short: .* tasks: none"):
        Generator(LATENT, weights(LATENT)).stream(PROMPTS, max_new_tokens=9, task="short")


@pytest.mark.quick
def test_buckets_are_few_and_hold_what_is_asked():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 64, 65, 97, 1000)] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 1024]
    assert len({bucket(n) for n in range(1, 5000)}) < 20


def test_weights_cast_once_give_the_logits_of_weights_cast_in_each_layer():
    config = dataclasses.replace(LATENT, compute_dtype="bfloat16")
    variables, tokens = weights(config), jnp.asarray([list(range(9))])
    once = compute_weights(config, variables)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(once)}
    assert dtypes == {"bfloat16", "float32"}

    def logits(variables):
        return jax.jit(Transformer(config).apply)(variables, tokens).logits_BTV

    np.testing.assert_array_equal(logits(once), logits(unstack_layers(config, variables)))


@pytest.mark.quick
def test_only_what_the_model_reads_is_put_on_the_device():
    variables = weights(GROUPED)
    assert compute_weights(GROUPED, variables | {"other": {"head": np.ones(3)}}).keys() == variables.keys()
    more = {"params": variables["params"] | {"mtp": {"w": np.ones((1, 3))}}}
    assert compute_weights(GROUPED, more)["params"].keys() == variables["params"].keys()
    predicting = dataclasses.replace(GROUPED, mtp=c.MultiToken(depth=1))
    assert "mtp" in compute_weights(predicting, more)["params"]
    assert "mtp" not in Generator(predicting, more).variables["params"]


@pytest.mark.quick
def test_generators_of_one_model_share_its_weights():
    config = dataclasses.replace(LATENT, compute_dtype="bfloat16")
    first = Generator(config, weights(config))
    second = Generator(config, first.variables)
    pairs = list(zip(jax.tree.leaves(first.variables), jax.tree.leaves(second.variables), strict=True))
    assert pairs and all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in pairs)


def test_routers_are_told_of_the_task():
    moe = c.MixtureOfExperts(num_experts=4, expert_dim=16, router=c.Softmax(), condition=c.Condition(("prose",), 4))
    config = tiny_model(moe=moe, context_length=LENGTH)
    variables = weights(config)
    at = variables["params"]["moe_layers"]["moe"]
    at["w_condition"] = 9 * jax.random.normal(jax.random.key(1), at["w_condition"].shape)  # zero at the start
    forward: Any = jax.jit(lambda tokens, condition: Transformer(config).apply(variables, tokens, condition=condition))
    generator, rows = Generator(config, variables), {}
    for task, condition in (("", 0), ("prose", 1)):

        def logits_after(ids: list[int], condition=condition) -> jax.Array:
            tokens_T = np.zeros(LENGTH, np.int32)
            tokens_T[: len(ids)] = ids
            return forward(tokens_T[None], np.full((1, LENGTH), condition, np.int32)).logits_BTV[0, len(ids) - 1]

        rows[task] = generator.generate(PROMPTS, max_new_tokens=6, task=task)
        assert rows[task] == [naive(logits_after, prompt, 6) for prompt in PROMPTS]
    assert rows[""] != rows["prose"]
    with pytest.raises(c.ConfigError, match="--task=code: .* tasks: prose"):
        generator.generate(PROMPTS, max_new_tokens=6, task="code")


@pytest.mark.quick
def test_what_needs_the_whole_text_has_no_cache():
    for change, says in (
        ({"dispatch": c.CapacityDispatch()}, r"dispatch=capacity: cannot decode.* use GroupedDispatch\(\)"),
        ({"expert": c.DeepExpert()}, r"expert=deep: cannot decode.* FeedForward\(\) experts"),
    ):
        config = tiny_model(moe=c.MixtureOfExperts(**change))
        with pytest.raises(c.ConfigError, match=says):
            make_cache(config, 1, 8)
