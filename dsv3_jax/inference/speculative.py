"""Exact speculative decoding: the multi-token-prediction modules draft, the model checks all drafts in one call.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318); modules as drafts: DeepSeek-V3
(arXiv:2412.19437, section 5.4.3).

One round, for n modules. The cache of the model holds L tokens of a row; the token at position L is known as well, and
not in the cache yet. Module k = 1 … n, from 1, joins the hidden state at position i with the token at i + k, so that at
position L − 1 it drafts the token at L + k. What the modules make of positions before L − n rests on certain tokens
alone and stays in their caches. A round runs them on the last n positions, or on n + 1 if the round before accepted all
drafts: that far they had not run (one module runs on each position once). Then the model runs on the token at L and the
n drafts, accepts some of them and gives one token more, and its cache forgets the rejected ones.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.inference.acceptance import DRAFT, accept_greedy, accept_sampled
from dsv3_jax.inference.generation import NO_TOKEN, STEPS_A_CALL, Generator, Limits, task_inputs
from dsv3_jax.inference.sampling import Sampling, first_best, probabilities, row_keys
from dsv3_jax.models.transformer import Transformer, head_weight, make_cache, make_prediction_cache
from dsv3_jax.ops.caches import Cache


@struct.dataclass
class Counts:
    """Of one generation, summed over rows: drafts that were checked, and those of them accepted; rounds; and the tokens
    of these rounds that were given out (the first token of a row belongs to no round)."""

    drafted: Any = 0
    accepted: Any = 0
    rounds: Any = 0
    tokens: Any = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts / drafts; NaN without any."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_a_round(self) -> float:
        """Tokens that a row gets of a round; NaN without any."""
        return self.tokens / self.rounds if self.rounds else float("nan")

    def __str__(self) -> str:
        if not self.drafted:
            return "no drafts were needed"
        return (
            f"{self.accepted} of {self.drafted} drafts accepted ({self.acceptance_rate:.1%}), "
            f"{self.tokens_a_round:.2f} tokens a round"
        )


@struct.dataclass
class DraftState:
    """What one round hands to the next.

    cache: of the model, L tokens a row. modules: a cache for each module. text_BX: the tokens of each row, of which the
    first L + 1 are certain. hidden_BWD: of the model, at positions first_B … L − 1. made_B: tokens each row has got.
    done_B: rows that have ended; their L stays.
    """

    cache: Cache
    modules: tuple[Cache, ...]
    text_BX: jax.Array
    hidden_BWD: jax.Array
    first_B: jax.Array
    made_B: jax.Array
    done_B: jax.Array
    counts: Counts


class Given(NamedTuple):
    """What a call to the device gives: the new tokens of each row from the left, then NO_TOKEN; the rows that have
    ended; counts so far."""

    tokens_BN: jax.Array
    done_B: jax.Array
    counts: Counts


def _at(x_BX: jax.Array, index_BW: jax.Array) -> jax.Array:
    """x[b, index[b]] for each row; an index out of range takes the nearest."""
    index = index_BW.reshape(*index_BW.shape, *(1,) * (x_BX.ndim - 2))
    return jnp.take_along_axis(x_BX, index, axis=1, mode="clip")


class SpeculativeGenerator(Generator):
    """A `Generator` that drafts with the model's multi-token-prediction modules.

    Greedy, it gives the tokens that `Generator` gives, up to ties within the rounding of logits; sampling, tokens of
    the same distribution, though not the same ones. A row's draws depend on its place in the batch and on nothing else
    in it. `counts` are those of the last text. `steps_a_call` counts rounds, each of 1 to depth + 1 tokens a row; rows
    that are ahead of others wait for them.

    Raises:
      ConfigError: the model has no such modules.
    """

    def __init__(self, config: ModelConfig, variables: Any, max_length: int | None = None):
        super().__init__(config, variables, max_length)
        self.counts = Counts()
        self._jit_begin = jax.jit(self._begin, static_argnames="cache_length")
        self._jit_rounds = jax.jit(self._rounds, donate_argnames="state")

    def _used(self, config: ModelConfig) -> ModelConfig:
        if config.mtp is None:
            raise ConfigError(
                "--draft=mtp: this model has no multi-token-prediction modules (config.model.mtp); leave --draft out, "
                "or train a model that has them"
            )
        self._depth = config.mtp.depth
        return config

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
        del total  # rows end by themselves
        lengths_B, rounds = np.asarray(lengths, np.int32), np.int32(min(steps_a_call, STEPS_A_CALL))
        state, given = self._jit_begin(
            self._variables, tokens_BT, lengths_B, limits, sampling, cache_length=cache_length
        )
        waiting: list[list[int]] = [[] for _ in lengths]
        while True:
            # Under way while the caller looks at what the call before gave; nothing, if all rows have ended.
            state, ahead = self._jit_rounds(self._variables, state, limits, sampling, rounds)
            done_B = np.asarray(given.done_B)
            for row, tokens_N in zip(waiting, np.asarray(given.tokens_BN), strict=True):
                row.extend(tokens_N[tokens_N != NO_TOKEN].tolist())
            self.counts = jax.tree.map(int, given.counts)
            tokens_BN = _columns(waiting, done_B)
            if tokens_BN.shape[1]:
                yield tokens_BN
            if done_B.all():
                return
            given = ahead

    def _begin(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        limits: Limits,
        how: Sampling,
        *,
        cache_length: int,
    ) -> tuple[DraftState, Given]:
        """The state after the prompts, and the first token of each row."""
        (B, T), n = tokens_BT.shape, self._depth
        cache = make_cache(self.config, B, cache_length, step=n + 1)
        hidden_BTD, state, given_B1 = self._first(variables, tokens_BT, lengths_B, cache, limits, how)
        text_BX = jnp.zeros((B, cache_length + n), jnp.int32).at[:, :T].set(tokens_BT)
        text_BX = text_BX.at[jnp.arange(B), lengths_B].set(state.token_B)
        first_B = jnp.maximum(lengths_B - n, 0)
        window_BW = first_B[:, None] + jnp.arange(n + 1)
        modules, x_BTD = [], hidden_BTD
        for index in range(n):
            empty = make_prediction_cache(self.config, index, B, cache_length, step=n + 1)
            ahead_BT = text_BX[:, index + 1 : index + 1 + T]
            x_BTD, _, module = self._predict(variables, index, x_BTD, ahead_BT, empty, first_B, limits)
            modules.append(module)
        made_B, zero = jnp.ones(B, jnp.int32), jnp.int32(0)
        counts = Counts(zero, zero, zero, zero)
        hidden_BWD = _at(hidden_BTD, window_BW)
        new = DraftState(state.cache, tuple(modules), text_BX, hidden_BWD, first_B, made_B, state.done_B, counts)
        return new, Given(given_B1, state.done_B, counts)

    def _rounds(
        self, variables: Any, state: DraftState, limits: Limits, how: Sampling, rounds: jax.Array
    ) -> tuple[DraftState, Given]:
        """Up to `rounds` rounds; stops early when every row has ended."""
        B, room = len(state.done_B), STEPS_A_CALL * (self._depth + 1)

        def going(carry: tuple[jax.Array, DraftState, jax.Array, jax.Array]) -> jax.Array:
            index, now, _, _ = carry
            return (index < rounds) & ~jnp.all(now.done_B)

        def body(carry: tuple[jax.Array, DraftState, jax.Array, jax.Array]):
            index, now, out_BN, filled_B = carry
            now, given_BM = self._round(variables, now, limits, how)
            is_given_BM = given_BM != NO_TOKEN
            place_BM = jnp.where(is_given_BM, filled_B[:, None] + jnp.arange(given_BM.shape[1]), room)
            out_BN = out_BN.at[jnp.arange(B)[:, None], place_BM].set(given_BM, mode="drop")
            return index + 1, now, out_BN, filled_B + jnp.sum(is_given_BM, axis=1)

        out_BN, filled_B = jnp.full((B, room), NO_TOKEN, jnp.int32), jnp.zeros(B, jnp.int32)
        _, state, out_BN, _ = jax.lax.while_loop(going, body, (jnp.int32(0), state, out_BN, filled_B))
        return state, Given(out_BN, state.done_B, state.counts)

    def _round(self, variables: Any, state: DraftState, limits: Limits, how: Sampling) -> tuple[DraftState, jax.Array]:
        """Drafts, checks, and takes back. Also gives the new tokens of each row, [B, M], NO_TOKEN after them."""
        B, n, live_B = len(state.done_B), self._depth, ~state.done_B
        place_M, length_B = jnp.arange(n + 1), state.cache.length_B
        seen_BM = state.made_B[:, None] + place_M
        keys_BM = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(row_keys(limits.seed, B), seen_BM)
        drafts_BN, q_BNV, text_BX, modules = self._draft(variables, state, keys_BM, limits, how)

        # A row that may get only r more tokens has r − 1 drafts checked: it then needs no more room than one by one.
        proposed_B = jnp.where(live_B, jnp.minimum(n, limits.budget_B - state.made_B - 1), 0)
        checked_BM = _at(text_BX, length_B[:, None] + place_M)
        count_B = jnp.where(live_B, proposed_B + 1, 0)
        hidden_BMD, cache = self._apply(variables, checked_BM, state.cache, count_B, limits)
        head_DV = head_weight(self.config, variables["params"])
        logits_BMV = jnp.einsum("BMD,DV->BMV", hidden_BMD, head_DV, preferred_element_type=jnp.float32)
        if q_BNV is None:
            accepted_B, next_B = accept_greedy(logits_BMV, drafts_BN, proposed_B)
        else:
            p_BMV = jax.vmap(probabilities, (1, None), 1)(logits_BMV, how)
            accepted_B, next_B = accept_sampled(p_BMV, q_BNV, drafts_BN, proposed_B, keys_BM)

        text_BX = text_BX.at[jnp.arange(B), length_B + accepted_B + 1].set(next_B, mode="drop")
        added_B = jnp.where(live_B, accepted_B + 1, 0)
        new_BM, is_new_BM = _at(text_BX, length_B[:, None] + 1 + place_M), place_M < added_B[:, None]
        is_stop_BM = is_new_BM & jnp.isin(new_BM, jnp.asarray(limits.stop_ids_N))
        given_BM = jnp.where(is_new_BM & ~jnp.cumsum(is_stop_BM, axis=1).astype(bool), new_BM, NO_TOKEN)
        made_B = state.made_B + added_B
        counts = jax.tree.map(
            lambda total, more: total + jnp.sum(more, dtype=jnp.int32),
            state.counts,
            Counts(proposed_B, jnp.where(live_B, accepted_B, 0), live_B, given_BM != NO_TOKEN),
        )

        # Positions before the new L are in the old hidden states or, from the old L on, in those of this round.
        first_B = jnp.minimum(length_B, jnp.maximum(length_B + added_B - n, 0))
        position_BW = first_B[:, None] + jnp.arange(n + 1)
        old_BW, new_BW = position_BW - state.first_B[:, None], n + 1 + position_BW - length_B[:, None]
        both_BXD = jnp.concatenate([state.hidden_BWD, hidden_BMD], axis=1)
        hidden_BWD = _at(both_BXD, jnp.where(position_BW < length_B[:, None], old_BW, new_BW))
        done_B = state.done_B | jnp.any(is_stop_BM, axis=1) | (made_B >= limits.budget_B)
        cache = cache.rollback(length_B + added_B)
        return DraftState(cache, modules, text_BX, hidden_BWD, first_B, made_B, done_B, counts), given_BM

    def _draft(
        self, variables: Any, state: DraftState, keys_BM: jax.Array, limits: Limits, how: Sampling
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, tuple[Cache, ...]]:
        """A draft of each module, the probabilities it was drawn from (None: greedy), the text with the drafts, and the
        caches."""
        B, n, length_B, first_B = len(state.done_B), self._depth, state.cache.length_B, state.first_B
        text_BX, x_BWD, head_DV = state.text_BX, state.hidden_BWD, head_weight(self.config, variables["params"])
        window_BW, count_B = first_B[:, None] + jnp.arange(n + 1), length_B - first_B
        drafts, qs, modules = [], [], []
        for index in range(n):
            ahead_BW, cache = _at(text_BX, window_BW + index + 1), state.modules[index].rollback(first_B)
            x_BWD, normed_BWD, cache = self._predict(variables, index, x_BWD, ahead_BW, cache, count_B, limits)
            last_BD = _at(normed_BWD, count_B[:, None] - 1)[:, 0]
            logits_BV = jnp.einsum("BD,DV->BV", last_BD, head_DV, preferred_element_type=jnp.float32)
            if how.temperature is None:
                draft_B = first_best(logits_BV)
            else:
                q_BV = probabilities(logits_BV, how)
                keys_B = jax.vmap(lambda key: jax.random.fold_in(key, DRAFT))(keys_BM[:, index])
                draft_B = jax.vmap(jax.random.categorical)(keys_B, jnp.log(q_BV)).astype(jnp.int32)
                qs.append(q_BV)
            text_BX = text_BX.at[jnp.arange(B), length_B + index + 1].set(draft_B, mode="drop")
            drafts.append(draft_B)
            modules.append(cache)
        return jnp.stack(drafts, axis=1), jnp.stack(qs, axis=1) if qs else None, text_BX, tuple(modules)

    def _predict(
        self,
        variables: Any,
        index: int,
        hidden_BTD: jax.Array,
        tokens_BT: jax.Array,
        cache: Cache,
        num_tokens_B: jax.Array,
        limits: Limits,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Module `index`, from 0: hidden states for the next module and for the head, and its cache."""
        result = Transformer(self.config).apply(
            variables,
            index,
            hidden_BTD,
            tokens_BT,
            **task_inputs(limits, tokens_BT),
            cache=cache,
            num_tokens_B=num_tokens_B,
            method="predict",
        )
        return cast(tuple[jax.Array, jax.Array, Cache], result)


def _columns(waiting: list[list[int]], done_B: np.ndarray) -> np.ndarray:
    """Takes from rows of tokens what every row that goes on has, int32 [B, n], NO_TOKEN where a row has ended."""
    going = [len(row) for row, done in zip(waiting, done_B, strict=True) if not done]
    count = min(going) if going else max(map(len, waiting))
    tokens_BN = np.full((len(waiting), count), NO_TOKEN, np.int32)
    for tokens_N, row in zip(tokens_BN, waiting, strict=True):
        taken = row[:count]
        tokens_N[: len(taken)] = taken
        del row[:count]
    return tokens_BN
