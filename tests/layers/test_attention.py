"""Caches: prefill then decode is one forward pass. Sinks, soft-capping, sparse attention, learned keys that learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.kernels.decode_attention import api
from dsv3_jax.kernels.sparse_attention import sparse_attention
from dsv3_jax.models.stack import unstack_layers
from dsv3_jax.models.transformer import Transformer, make_cache
from dsv3_jax.ops.indexing import Index
from dsv3_jax.ops.patterns import Place
from tests.conftest import assert_close, tiny_model

LATENT = c.Latent(num_heads=2, query_latent_dim=16, latent_dim=8, nope_head_dim=8, rope_head_dim=8, value_head_dim=8)
PROJECTIONS = {
    "latent": LATENT,
    "latent, no query compression": dataclasses.replace(LATENT, query_latent_dim=None),
    "grouped query": c.GroupedQuery(4, 2, 8),
    "grouped query, qk norm": c.GroupedQuery(4, 2, 8, qk_norm=True),
}
PATTERNS = {
    "full": c.Full(),
    "window": c.Windowed(6),
    "window, global": c.Windowed(4, (0, 2, 9)),
    "overlapping, global": c.Windowed(6, (1,), stride=3),
    "run time": c.RuntimeWindowed(6, (0,)),
    "segments": c.Segmented(5),
    "segments over all": c.Segmented(5, keys="all"),
    "learned": c.LearnedGlobal(4, 4, 2),
    "learned, overlapping": c.LearnedGlobal(4, 2, 3),
    "sparse": c.Sparse(5, 4, 16),
    "sparse, warming up": c.Sparse(5, 4, 16, stage="warmup"),
    "window, window, full": c.PerLayer((c.Windowed(4), c.Windowed(6, (0,)), c.Full())),
}
ALL = [("latent", pattern) for pattern in PATTERNS] + [("grouped query", pattern) for pattern in PATTERNS]
ALL += [("latent, no query compression", name) for name in ("full", "sparse")] + [("grouped query, qk norm", "full")]
# Together these touch every line; the whole product is slow.
QUICK = [
    ("latent", "window, global"),
    ("latent", "sparse"),
    ("grouped query", "learned"),
    ("grouped query", "run time"),
]
PRODUCT = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=" × ".join(case)) for case in ALL]
LENGTHS, TOTAL = (11, 5, 8), 20  # of the prompts; of the texts


def make_model(projection: str, pattern: str, **attention) -> c.ModelConfig:
    attention = c.Attention(PROJECTIONS[projection], PATTERNS[pattern], **attention)
    layers = 4 if pattern == "window, window, full" else 2
    model = tiny_model(attention=attention, num_layers=layers)
    c.validate_model(model)
    return model


def init(model):
    variables = nn.unbox(jax.jit(Transformer(model).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    # norms, sinks and biases that matter
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), variables)


def windows(model, tokens):
    if not isinstance(model.attention.pattern, c.RuntimeWindowed):
        return None
    return jax.random.randint(jax.random.key(5), tokens.shape, 1, 7)


def decode_all(model, variables, tokens, lengths, step=1):
    """Logits of every position: of the prompts by one call on rows padded at the end, then `step` tokens a call."""
    B, window = len(tokens), windows(model, tokens)
    model_apply = Transformer(model).apply

    @jax.jit
    def call(tokens, cache, num_tokens, window):
        output = model_apply(variables, tokens, cache=cache, num_tokens_B=num_tokens, window_BT=window)
        return output.logits_BTV, output.cache

    lengths, logits = np.asarray(lengths), np.zeros((*tokens.shape, model.vocab_size), np.float32)
    longest, done = lengths.max(), np.zeros(B, int)
    padded = np.where(np.arange(longest) < lengths[:, None], tokens[:, :longest], 0)
    cache, new = make_cache(model, B, TOTAL, step), lengths
    window_now = None if window is None else window[:, :longest]
    while True:
        out, cache = call(jnp.asarray(padded), cache, jnp.asarray(new, jnp.int32), window_now)
        for row in range(B):
            logits[row, done[row] : done[row] + new[row]] = out[row, : new[row]]
        done += new
        np.testing.assert_array_equal(cache.length_B, done)
        if np.all(done == TOTAL):
            return logits
        new = np.minimum(step, TOTAL - done)  # rows that are done get no token
        columns = np.minimum(done[:, None] + np.arange(step), TOTAL - 1)
        padded = np.take_along_axis(np.asarray(tokens), columns, axis=1)
        window_now = None if window is None else jnp.take_along_axis(window, jnp.asarray(columns), axis=1)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, TOTAL), 0, 320)


@pytest.mark.parametrize(("projection", "pattern"), PRODUCT)
def test_prefill_then_decode_is_one_forward_pass(projection, pattern, tokens):
    model = make_model(projection, pattern)
    variables = init(model)
    expected = jax.jit(Transformer(model).apply)(variables, tokens, window_BT=windows(model, tokens)).logits_BTV
    # float32, another order of sums; absorbed and rebuilt keys
    assert_close(decode_all(model, variables, tokens, LENGTHS), expected, 2e-5)


@pytest.mark.parametrize(
    ("projection", "pattern"), [("latent", "window, global"), pytest.param("latent", "sparse", marks=pytest.mark.slow)]
)
def test_several_tokens_a_call_and_weights_by_layer(projection, pattern, tokens):
    model = make_model(projection, pattern, sinks=True, softcap=3.0, rope_scaling=c.Yarn(4.0, 8))
    variables = init(model)
    expected = jax.jit(Transformer(model).apply)(variables, tokens).logits_BTV
    variables = unstack_layers(model, variables)
    assert_close(jax.jit(Transformer(model).apply)(variables, tokens).logits_BTV, expected, 1e-5)
    assert_close(decode_all(model, variables, tokens, LENGTHS, step=3), expected, 2e-5)


def test_a_cache_rolled_back_forgets_a_rejected_draft(tokens):
    model = make_model("grouped query", "window, global")
    variables, T = init(model), TOTAL
    expected = jax.jit(Transformer(model).apply)(variables, tokens).logits_BTV

    @jax.jit
    def call(tokens, cache):
        output = Transformer(model).apply(variables, tokens, cache=cache)
        return output.logits_BTV, output.cache

    _, cache = call(tokens[:, :12], make_cache(model, 3, T, step=4))
    keep = jnp.array([1, 0, 4])  # of four drafted tokens
    draft = jnp.where(jnp.arange(4) < keep[:, None], tokens[:, 12:16], 7)
    _, cache = call(draft, cache)
    cache = cache.rollback(12 + keep)
    for _ in range(4):
        at = cache.length_B[:, None]
        logits, cache = call(jnp.take_along_axis(tokens, at, axis=1), cache)
        assert_close(logits, jnp.take_along_axis(expected, at[..., None], axis=1), 2e-5)


def test_a_window_keeps_a_ring_and_its_global_keys_and_latent_attention_keeps_latents():
    def numbers(model, length):
        cache = make_cache(model, 1, length)
        return [sum(array.size for array in layer) for layer in cache.layers]

    full, ring = make_model("latent", "full"), make_model("latent", "window, global")
    assert numbers(full, 100) == [100 * (8 + 8)] * 2
    assert numbers(ring, 100) == numbers(ring, 1000) == [(4 + 3) * (8 + 8)] * 2
    assert numbers(make_model("grouped query", "full"), 100) == [100 * 2 * 2 * 8] * 2
    assert numbers(make_model("latent", "sparse"), 100) == [100 * (8 + 8 + 16)] * 2
    deepseek = c.load("configs/dsv3_671b.py").model
    cache = jax.eval_shape(lambda: make_cache(deepseek, 1, 4096))
    assert cache.layers[0][0].shape == (1, 4096, 576)  # the published 576 values a token and layer


def test_what_does_not_fit_a_cache_is_refused(tokens):
    model = make_model("latent", "full")
    variables = init(model)
    apply = Transformer(model).apply
    with pytest.raises(ValueError, match="max_length=8"):
        apply(variables, tokens, cache=make_cache(model, 3, 8))
    cache = apply(variables, tokens[:, :4], cache=make_cache(model, 3, 8)).cache
    with pytest.raises(ValueError, match="2 tokens a row were given to a cache of step=1"):
        apply(variables, tokens[:, :2], cache=cache)
    with pytest.raises(ValueError, match="window_BT was given"):
        apply(variables, tokens, window_BT=jnp.full(tokens.shape, 2))
    with pytest.raises(ValueError, match="num_tokens_B goes with a cache"):
        apply(variables, tokens, num_tokens_B=jnp.array([1, 2, 3]))
    with pytest.raises(c.ConfigError, match="only causal models decode"):
        make_cache(make_model("latent", "full", causal=False), 1, 8)


@pytest.mark.slow
def test_a_row_beyond_its_cache_gives_nan_and_the_others_go_on(tokens):
    model = make_model("latent", "full")
    variables = init(model)
    expected = jax.jit(Transformer(model).apply)(variables, tokens).logits_BTV
    lengths = jnp.array([8, 5, 8])
    cache = make_cache(model, 3, 8)
    cache = Transformer(model).apply(variables, tokens[:, :8], cache=cache, num_tokens_B=lengths).cache
    following = jnp.take_along_axis(tokens, lengths[:, None], axis=1)
    output = Transformer(model).apply(variables, following, cache=cache, num_tokens_B=jnp.array([1, 9, 0]))
    assert np.all(np.isnan(output.logits_BTV[0]))
    assert_close(output.logits_BTV[1, 0], expected[1, 5], 2e-5)  # 9 new tokens of one column are one
    np.testing.assert_array_equal(output.cache.length_B, [9, 6, 8])


# Bidirectional forms.


@pytest.mark.parametrize("pattern", ["window, global", pytest.param("learned", marks=pytest.mark.slow), "sparse"])
def test_bidirectional_queries_see_later_keys_and_padding_changes_nothing(pattern, tokens):
    model = make_model("grouped query", pattern, causal=False)
    variables = init(model)
    apply = jax.jit(Transformer(model).apply)
    changed = tokens.at[:, 6].set((tokens[:, 6] + 7) % 320)
    difference = np.abs(apply(variables, tokens).logits_BTV - apply(variables, changed).logits_BTV)
    assert difference[:, 4].max() > 1e-4  # position 4 sees position 6
    length = 13
    positions = jnp.broadcast_to(jnp.arange(TOTAL), tokens.shape)
    real = (jnp.arange(TOTAL) < length).astype(jnp.int32)
    padded = apply(variables, tokens, positions, jnp.broadcast_to(real, tokens.shape)).logits_BTV
    assert_close(padded[:, :length], apply(variables, tokens[:, :length]).logits_BTV, 2e-5)


# Sparse attention.


def sparse_inputs():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    B, T = 2, 40
    heads = normal(B, T, 4, 8), normal(B, T, 2, 8), normal(B, T, 2, 6)
    index = Index(normal(B, T, 3, 8), normal(B, T, 8), normal(B, T, 3))
    segment = jnp.stack([jnp.ones(T, jnp.int32), jnp.where(jnp.arange(T) < 15, 1, jnp.where(jnp.arange(T) < 35, 2, 0))])
    position = jnp.stack([jnp.arange(T), jnp.where(jnp.arange(T) < 15, jnp.arange(T), jnp.arange(T) - 15)])
    return heads, index, Place(position, segment)


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_sparse_attention_and_its_loss_are_those_of_a_loop_over_queries(stage):
    (q, k, v), index, place = jax.tree.map(lambda x: np.asarray(x, np.float64), sparse_inputs())
    pattern = c.Sparse(6, 3, 8, stage)
    out, _, loss = sparse_attention(
        *sparse_inputs()[0], sparse_inputs()[1], pattern=pattern, scale=0.3, place=sparse_inputs()[2]
    )
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [
                s
                for s in range(t + 1)
                if place.segment_BT[b, s] == place.segment_BT[b, t] and place.segment_BT[b, t] > 0
            ]
            if not seen:
                np.testing.assert_array_equal(out[b, t], 0)
                continue
            scores = {s: sum(index.w_BTH[b, t] * np.maximum(index.q_BTHI[b, t] @ index.k_BSI[b, s], 0)) for s in seen}
            if stage == "sparse":
                seen = sorted(sorted(seen), key=lambda s: -scores[s])[:6]
            mean = 0
            for h in range(4):
                logits = 0.3 * k[b, seen, h // 2] @ q[b, t, h]
                p = np.exp(logits - logits.max())
                p /= p.sum()
                mean = mean + p / 4
                np.testing.assert_allclose(out[b, t, h], p @ v[b, seen, h // 2], rtol=1e-4, atol=1e-5)
            chosen = np.array([scores[s] for s in seen])
            log_q = chosen - chosen.max() - np.log(np.exp(chosen - chosen.max()).sum())
            np.testing.assert_allclose(loss[b, t], mean @ (np.log(mean) - log_q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_queries_in_chunks_give_the_same_outputs_and_gradients(stage, monkeypatch):
    monkeypatch.setattr("dsv3_jax.kernels.sparse_attention.chunked.CHUNK", 16)
    heads, index, place = sparse_inputs()

    def run(name):
        def total(heads, index):
            out, lse, loss = sparse_attention(
                *heads, index, pattern=c.Sparse(6, 3, 8, stage), scale=0.3, place=place, implementation=name
            )
            lse = jnp.where(jnp.isfinite(lse), lse, 0)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)) + jnp.sum(jnp.cos(loss)), (out, lse, loss)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(heads, index)

    assert_close(run("chunked"), run("reference"), 1e-5)


def test_the_indexer_learns_from_its_loss_alone_and_teaches_nothing_else(tokens):
    model = make_model("latent", "sparse")
    variables = init(model)

    def loss(params, of):
        output = Transformer(model).apply(variables | {"params": params}, tokens)
        return output.sums["indexer"] if of == "indexer" else jnp.mean(output.logits_BTV**2)

    for of in ("indexer", "lm"):
        gradients = jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], of)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
            inside = any(key.key == "indexer" for key in path)
            assert bool(jnp.any(leaf != 0)) == (inside == (of == "indexer")), (of, path)


def test_sparse_with_room_for_every_key_is_full_attention(tokens):
    model = make_model("latent", "sparse")
    model.attention.pattern = c.Sparse(TOTAL, 4, 16)
    full = dataclasses.replace(model, attention=dataclasses.replace(model.attention, pattern=c.Full()))
    variables = init(model)
    assert_close(
        Transformer(model).apply(variables, tokens).logits_BTV,
        Transformer(full).apply(variables, tokens).logits_BTV,
        1e-5,
    )


# Sinks.


def test_a_sink_is_a_key_without_a_value(tokens):
    model = make_model("grouped query", "full", sinks=True)
    variables = init(model)
    low = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, -1e9) if path[-1].key == "sinks" else x, variables
    )
    plain = dataclasses.replace(model, attention=dataclasses.replace(model.attention, sinks=False))
    expected = Transformer(plain).apply(variables, tokens).logits_BTV
    assert_close(Transformer(model).apply(low, tokens).logits_BTV, expected, 1e-6)
    assert np.abs(Transformer(model).apply(variables, tokens).logits_BTV - expected).max() > 1e-3


def test_decoding_runs_the_kernel_that_the_config_names(monkeypatch):
    """A latent layer decodes through the interpreted kernels as without them."""
    seen = []
    kernel = api.IMPLEMENTATIONS["pallas_tpu"]
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", lambda *a: seen.append(1) or kernel(*a))
    base = tiny_model(num_layers=1, num_dense_layers=1, moe=None)
    tokens = jnp.arange(5)[None]
    logits = {}
    for name in ("reference", "pallas_tpu"):
        config = dataclasses.replace(base, attention=dataclasses.replace(base.attention, implementation=name))
        model = Transformer(config)
        variables = jax.jit(model.init)(jax.random.key(0), tokens)
        cache = make_cache(config, 1, max_length=8, step=1)
        cache = model.apply(variables, tokens[:, :4], cache=cache).cache
        logits[name] = model.apply(variables, tokens[:, 4:], cache=cache).logits_BTV
    assert seen
    assert_close(logits["pallas_tpu"], logits["reference"], 1e-5)
