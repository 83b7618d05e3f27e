"""One cell of the table of combinations: two updates of a tiny model, then what must hold of it."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.models.transformer import Transformer, TransformerOutput, make_cache, task_conditions
from dsv3_jax.ops.patterns import task_windows
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.loop import check_terms
from dsv3_jax.training.step import Trainer
from dsv3_jax.training.terms import term_weights

UPDATES = 2
PROMPTS, NEW = (7, 4), 12  # tokens of each row by one call, then one by one
# Relative to the largest logit. float32: another order of sums. bfloat16: eight bits, 2^-8 = 4e-3, rounded again in
# each layer; and a choice (of experts, keys or units) between two that are equal to rounding may fall otherwise, which
# moves that token and what sees it: one token in four is left out.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
AGREEING = {"float32": 1.0, "bfloat16": 0.75}


class CheckFailed(Exception):
    """A cell does what no cell may."""


class Checked(NamedTuple):
    """What a cell that passed was seen to do. losses: before each update and after the last. changed: difference of
    logits before a changed token; decoded: of decoding and the whole text at once; both as `_difference`. no_cache:
    why `make_cache` refused, then `decoded` is None."""

    losses: list[float]
    changed: float
    decoded: float | None
    no_cache: str | None


def make_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; rows of two documents of different domains and some padding, or of one (`data.max_segments=1`)."""
    chance, packed = np.random.default_rng(seed), config.data.max_segments > 1
    B, T = config.train.batch_size, config.data.sequence_length
    tokens = chance.integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    segments = np.ones((B, T), np.int32)
    domain = np.broadcast_to(np.arange(B, dtype=np.int32)[:, None] % len(config.data.domains), (B, T)).copy()
    if packed:
        for row in range(B):
            cut, end = T // 3 + row, T - 3 + row
            for start, segment in ((cut, 2), (end, 0)):
                positions[row, start:] = np.arange(T - start)
                segments[row, start:] = segment
            domain[row, cut:] = (row + 1) % len(config.data.domains)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segments}
    return batch | {"domain": domain}


def _tasks(config: Config, domain_BT: np.ndarray) -> dict[str, Any]:
    """What the model is told of tasks, as `summed_loss` tells it."""
    names = [domain.name for domain in config.data.domains]
    windows = task_windows(config.model.attention.pattern, names)
    conditions = task_conditions(config.model, names)
    return {
        "window_BT": None if windows is None else windows[domain_BT],
        "condition": None if conditions is None else conditions[domain_BT],
    }


def check_cell(config: Config) -> Checked:
    """Runs a validated config. Raises `CheckFailed`, or whatever the model raises."""
    trainer = Trainer(config, make_mesh(config.mesh))
    batch = make_batch(config)
    state, losses = trainer.init(0), []
    warming = config.train.trainable == ("indexer",)
    for step in range(UPDATES + 1):
        weights = term_weights(config, step)
        state, metrics = trainer.step(state, batch)
        values = {name: float(value) for name, value in metrics.items()}
        check_terms(step, values, weights)  # finite, and no term that is on is zero
        losses.append(values["loss/indexer" if warming else "loss"])
    if not losses[-1] < losses[0]:
        raise CheckFailed(f"the loss does not fall on a repeated batch: {losses}")
    variables = jax.tree.map(jnp.asarray, jax.device_get(state.variables()))
    ahead = config.model.mtp is not None
    forward = jax.jit(functools.partial(Transformer(config.model).apply, predict_ahead=ahead))
    changed = _check_causality(config, forward, variables, batch)
    try:
        cache = make_cache(config.model, len(PROMPTS), config.data.sequence_length)
    except ConfigError as error:
        return Checked(losses, changed, None, str(error))
    return Checked(losses, changed, _check_decoding(config, forward, variables, batch, cache), None)


def _difference(config: Config, what: str, actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of vectors, lists of [..., width], relative to the largest value; of bfloat16 among the
    three quarters that agree best. Raises `CheckFailed` beyond the tolerance."""
    dtype = config.model.compute_dtype
    error_N = np.concatenate(
        [np.abs(a - e).max(axis=-1).ravel() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)]
    )
    error = float(np.quantile(error_N, AGREEING[dtype], method="lower"))
    if not error <= TOLERANCE[dtype]:
        raise CheckFailed(f"{what}: relative error {error:.1e} > {TOLERANCE[dtype]:.0e}")
    return error


def _outputs(output: Any) -> list[np.ndarray]:
    """Logits, and what each multi-token-prediction module gives to the head, float32 [B, T, width]."""
    output = cast(TransformerOutput, output)
    ahead = [] if output.prediction is None else list(output.prediction.hidden_kBTD)
    return [np.asarray(x, np.float32) for x in (output.logits_BTV, *ahead)]


def _check_causality(config: Config, forward: Any, variables: Any, batch: dict[str, np.ndarray]) -> float:
    """Other tokens from the middle on change nothing before them, and something after. In evaluation, packed or not."""
    cut, tokens = config.data.sequence_length // 2, batch["tokens"]
    other = np.where(np.arange(tokens.shape[1]) < cut, tokens, (tokens + 7) % config.model.vocab_size)
    tasks = _tasks(config, batch["domain"])
    before, after = (
        _outputs(forward(variables, x, batch["positions"], batch["segment_ids"], **tasks)) for x in (tokens, other)
    )
    if not np.abs(before[0] - after[0])[:, cut:].max() > 0:
        raise CheckFailed("tokens change nothing that comes after them")
    ends = range(cut, cut - len(before), -1)  # a module sees as many tokens further as its number says
    unseen = [[x[:, :end] for x, end in zip(outputs, ends, strict=True)] for outputs in (after, before)]
    return _difference(config, f"tokens from {cut} on change what comes before them", *unseen)


def _check_decoding(config: Config, forward: Any, variables: Any, batch: dict[str, np.ndarray], cache: Any) -> float:
    """Prompts by one call, then token by token, against a whole document at once."""
    tokens, lengths = batch["tokens"], np.asarray(PROMPTS, np.int32)
    B, T = tokens.shape
    whole = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), np.ones((B, T), np.int32)
    tasks = _tasks(config, np.broadcast_to(batch["domain"][:, :1], (B, T)))
    expected_BTV = _outputs(forward(variables, tokens, *whole, **tasks))[0]

    @jax.jit
    def call(tokens, tasks, cache, num_tokens_B):
        output = Transformer(config.model).apply(variables, tokens, cache=cache, num_tokens_B=num_tokens_B, **tasks)
        output = cast(TransformerOutput, output)
        return output.logits_BTV, output.cache

    def told(count: int) -> dict[str, Any]:
        return {name: None if x is None else x[:, :count] for name, x in tasks.items()}

    rows, longest = np.arange(B), max(PROMPTS)
    logits, cache = call(tokens[:, :longest], told(longest), cache, lengths)
    actual = [logits[row, :length] for row, length in enumerate(PROMPTS)]
    expected = [expected_BTV[row, :length] for row, length in enumerate(PROMPTS)]
    for step in range(NEW):
        at = lengths + step
        logits, cache = call(tokens[rows, at][:, None], told(1), cache, np.ones(B, np.int32))
        actual.append(logits[:, 0])
        expected.append(expected_BTV[rows, at])
    joined = [np.concatenate(parts) for parts in (actual, expected)]
    return _difference(config, "decoding is not the whole text at once", [joined[0]], [joined[1]])
