"""Batched generation: one prefill over the prompts, then decode steps on the device, several a call."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config import ConfigError, ModelConfig, RuntimeWindowed
from dsv3_jax.inference.sampling import GREEDY, Sampling, row_keys, sample
from dsv3_jax.models.stack import unstack_layers
from dsv3_jax.models.transformer import Transformer, TransformerOutput, head_weight, make_cache, task_conditions
from dsv3_jax.ops.caches import Cache
from dsv3_jax.ops.patterns import layer_patterns, task_windows

NO_TOKEN = -1  # stands where a row has ended
STEPS_A_CALL = 32
SMALLEST_BUCKET = 16
FLOAT32_WEIGHTS = ("w_router", "w_condition", "w_gate_in", "w_gate_out")  # layers use them as they are


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, …: programs are compiled for these lengths only."""
    size = SMALLEST_BUCKET
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size


def compute_weights(config: ModelConfig, variables: Any) -> Any:
    """Variables on the device, one array a layer; each matrix that the layers cast to the compute dtype is cast once.

    Norms, biases, routers and the like are used in float32 and stay so. Multi-token-prediction modules are left out
    where `config.mtp` is none.
    """

    def place(path: tuple[Any, ...], x: Any) -> jax.Array:
        name = path[-1].key
        is_matrix = name in ("embedding", "head") or (name.startswith("w_") and name not in FLOAT32_WEIGHTS)
        return jnp.asarray(x, config.compute_dtype if is_matrix else jnp.float32)

    used = {name: dict(variables[name]) for name in ("params", "selection_bias") if name in variables}
    if config.mtp is None:
        used = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in used.items()}
    return jax.tree_util.tree_map_with_path(place, unstack_layers(config, used))


@struct.dataclass
class DecodeState:
    """What one step hands to the next. token_B: the last token of each row, not yet in the cache. step: tokens made so
    far. done_B: rows that have ended; they leave the cache as it is."""

    cache: Cache
    token_B: jax.Array
    step: jax.Array
    done_B: jax.Array


class Limits(NamedTuple):
    """How a row ends: a stop id, or `budget_B` tokens; the seed of the draws; window_B and condition_B, int32, where
    layers have a window that is set at run time, and routers a condition."""

    stop_ids_N: Any
    budget_B: Any
    seed: Any
    window_B: Any
    condition_B: Any


def window_and_condition(config: ModelConfig, task: str) -> tuple[int | None, int | None]:
    """The window that layers of run-time windows have in a task ("": their default), and what routers with a condition
    know of it; None where the model has no such layers or routers.

    Raises:
      ConfigError: neither a layer nor a router knows the task.
    """
    members = [member for member in layer_patterns(config.attention.pattern) if isinstance(member, RuntimeWindowed)]
    known = [entry.task for member in members for entry in member.tasks]
    if config.moe is not None and config.moe.condition is not None:
        known += config.moe.condition.tasks
    if task and task not in known:
        names = ", ".join(dict.fromkeys(known)) or "none"
        raise ConfigError(f"--task={task}: this model has no window and no router condition for it; tasks: {names}")
    windows, conditions = task_windows(config.attention.pattern, [task]), task_conditions(config, [task])
    return (None if windows is None else int(windows[0])), (None if conditions is None else int(conditions[0]))


def task_inputs(limits: Limits, tokens_BT: jax.Array) -> dict[str, Any]:
    """What the model is told of the task at each token."""

    def spread(x_B: Any) -> jax.Array | None:
        return None if x_B is None else jnp.broadcast_to(jnp.asarray(x_B)[:, None], tokens_BT.shape)

    return {"window_BT": spread(limits.window_B), "condition": spread(limits.condition_B)}


class Generator:
    """Generates from prompts of unequal length. Compiles once for each batch size and bucket of lengths.

    `max_length` bounds prompt and new tokens together; the smaller of it and `config.context_length` holds.
    """

    def __init__(self, config: ModelConfig, variables: Any, max_length: int | None = None):
        self.config = config = self._used(config)
        known = [length for length in (config.context_length, max_length) if length is not None]
        self.max_length = min(known) if known else None
        self._variables = compute_weights(config, variables)
        self._jit_prefill = jax.jit(self._prefill, static_argnames="cache_length")
        self._jit_decode = jax.jit(self._decode, donate_argnames="state")

    @property
    def variables(self) -> Any:
        """The weights on the device. A generator of the same model that is given them makes no copy."""
        return self._variables

    def _used(self, config: ModelConfig) -> ModelConfig:
        """What of the model this generator runs."""
        return dataclasses.replace(config, mtp=None)

    def room(self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int) -> list[int]:
        """The most tokens that each prompt can get: `max_new_tokens`, or what the context has left.

        Raises:
          ConfigError: an empty prompt, one that leaves no room in the context, or ids that the model has not.
        """
        lengths = [len(prompt) for prompt in prompts]
        if max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens={max_new_tokens}: must be at least 1")
        if not lengths or min(lengths) < 1:
            raise ConfigError("--prompt: is empty, and this model's tokenizer adds no begin token; give some text")
        last = self.config.vocab_size - 1
        unknown = [token for prompt in prompts for token in (int(np.min(prompt)), int(np.max(prompt)))]
        unknown = [token for token in unknown if not 0 <= token <= last]
        if unknown:
            raise ConfigError(
                f"--prompt: has token {unknown[0]}, and the model knows 0 to {last}; its tokenizer is another"
            )
        if self.max_length is None:
            return [max_new_tokens] * len(lengths)
        if max(lengths) >= self.max_length:
            raise ConfigError(
                f"--prompt: has {max(lengths)} tokens, and the context holds {self.max_length}, new ones included; "
                "shorten the prompt"
            )
        return [min(max_new_tokens, self.max_length - length) for length in lengths]

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Iterable[int] = (),
        task: str = "",
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop id that ended it. See `stream` for arguments and errors."""
        rows: list[list[int]] = [[] for _ in prompts]
        options: Any = {"sampling": sampling, "seed": seed, "stop_ids": stop_ids, "task": task}
        for tokens_BN in self.stream(prompts, max_new_tokens=max_new_tokens, steps_a_call=STEPS_A_CALL, **options):
            for row, new in zip(rows, tokens_BN.tolist(), strict=True):
                row.extend(token for token in new if token != NO_TOKEN)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Iterable[int] = (),
        task: str = "",
        steps_a_call: int = 1,
    ) -> Iterator[np.ndarray]:
        """New tokens as they come, int32 [B, n], NO_TOKEN where a row has ended, until every row has.

        A row ends before a stop id, after `max_new_tokens`, or where the context is full. The next call to the device
        is under way while the caller looks at what the one before gave.

        Args:
          prompts: ids of each row, at least one.
          seed: with it, a row's draws depend on its place in the batch and on nothing else in it.
          task: its window holds in layers of run-time windows, and routers with a condition are told of it.
          steps_a_call: 1 gives each token as it is made; more is faster. At most 32.

        Raises:
          ConfigError: as `room`, or no step a call.
        """
        if steps_a_call < 1:
            raise ConfigError(f"steps_a_call={steps_a_call}: must be at least 1")
        budgets = self.room(prompts, max_new_tokens)
        lengths = [len(prompt) for prompt in prompts]
        needed = max(length + budget for length, budget in zip(lengths, budgets, strict=True))
        cache_length = min(bucket(needed), self.max_length or bucket(needed))
        tokens_BT = np.zeros((len(prompts), min(bucket(max(lengths)), cache_length)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        stops_N, budget_B = np.asarray(sorted(stop_ids), np.int32), np.asarray(budgets, np.int32)
        window_B, condition_B = (
            None if value is None else np.full(len(prompts), value, np.int32)
            for value in window_and_condition(self.config, task)
        )
        limits = Limits(stops_N, budget_B, np.asarray(seed, np.uint32), window_B, condition_B)
        return self._stream(tokens_BT, lengths, limits, sampling, cache_length, max(budgets), steps_a_call)

    def _stream(
        self,
        tokens_BT: np.ndarray,
        lengths: list[int],
        limits: Limits,
        sampling: Sampling,
        cache_length: int,
        total: int,
        steps_a_call: int,
    ) -> Iterator[np.ndarray]:
        lengths_B = np.asarray(lengths, np.int32)
        state, out = self._jit_prefill(
            self._variables, tokens_BT, lengths_B, limits, sampling, cache_length=cache_length
        )
        made, count = 1, 1
        while True:
            ahead = None
            if made < total:
                steps = min(steps_a_call, STEPS_A_CALL, total - made)
                state, ahead = self._jit_decode(self._variables, state, limits, sampling, np.int32(steps))
                made += steps
            tokens_BN = np.asarray(out)[:, :count]
            # Columns where every row has ended hold nothing.
            live = int((tokens_BN != NO_TOKEN).any(axis=0).sum())
            if live:
                yield tokens_BN[:, :live]
            if ahead is None or live < count:
                return
            out, count = ahead, steps

    def _apply(
        self, variables: Any, tokens_BT: jax.Array, cache: Cache, num_tokens_B: jax.Array, limits: Limits
    ) -> tuple[jax.Array, Cache]:
        """The last hidden state of each token, and the new cache."""
        output = Transformer(self.config).apply(
            variables,
            tokens_BT,
            **task_inputs(limits, tokens_BT),
            cache=cache,
            num_tokens_B=num_tokens_B,
            return_logits=False,
        )
        output = cast(TransformerOutput, output)
        return output.hidden_BTD, cast(Cache, output.cache)

    def _next(
        self, variables: Any, hidden_BD: jax.Array, step: jax.Array, done_B: jax.Array, limits: Limits, how: Sampling
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The token after `hidden_BD`, what of it is given out, and which rows have ended with it."""
        head_DV = head_weight(self.config, variables["params"])
        logits_BV = jnp.einsum("BD,DV->BV", hidden_BD, head_DV, preferred_element_type=jnp.float32)
        token_B = sample(logits_BV, row_keys(limits.seed, len(hidden_BD)), step, how)
        done_B |= jnp.isin(token_B, jnp.asarray(limits.stop_ids_N))
        given_B = jnp.where(done_B, NO_TOKEN, token_B)
        return token_B, given_B, done_B | (step + 1 >= limits.budget_B)

    def _prefill(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        limits: Limits,
        how: Sampling,
        *,
        cache_length: int,
    ) -> tuple[DecodeState, jax.Array]:
        """The state after the prompts, and the first token of each row, [B, 1]."""
        cache = make_cache(self.config, len(tokens_BT), cache_length)
        _, state, given_B1 = self._first(variables, tokens_BT, lengths_B, cache, limits, how)
        return state, given_B1

    def _first(
        self, variables: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache, limits: Limits, how: Sampling
    ) -> tuple[jax.Array, DecodeState, jax.Array]:
        """Of the prompts: hidden_BTD, the state after them, and the first token of each row, [B, 1]."""
        B, step = len(tokens_BT), jnp.int32(0)
        hidden_BTD, cache = self._apply(variables, tokens_BT, cache, lengths_B, limits)
        hidden_BD = hidden_BTD[jnp.arange(B), lengths_B - 1]
        token_B, given_B, done_B = self._next(variables, hidden_BD, step, jnp.zeros(B, bool), limits, how)
        return hidden_BTD, DecodeState(cache, token_B, step + 1, done_B), given_B[:, None]

    def _decode(
        self, variables: Any, state: DecodeState, limits: Limits, how: Sampling, steps: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        """Up to `steps` more tokens a row, [B, STEPS_A_CALL]; stops early when every row has ended."""
        begin = state.step

        def going(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
            now, _ = carry
            return (now.step - begin < steps) & ~jnp.all(now.done_B)

        def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
            now, out_BN = carry
            live_B = (~now.done_B).astype(jnp.int32)
            hidden_BTD, cache = self._apply(variables, now.token_B[:, None], now.cache, live_B, limits)
            token_B, given_B, done_B = self._next(variables, hidden_BTD[:, 0], now.step, now.done_B, limits, how)
            out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, given_B[:, None], now.step - begin, axis=1)
            return DecodeState(cache, token_B, now.step + 1, done_B), out_BN

        out_BN = jnp.full((len(state.token_B), STEPS_A_CALL), NO_TOKEN, jnp.int32)
        return jax.lax.while_loop(going, step, (state, out_BN))
