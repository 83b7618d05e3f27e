"""What every dispatch is tried on: routings, operands, outputs and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_experts
from dsv3_jax.ops.dispatch import capacity_dispatch, dense_dispatch

P, K, E, D, F = 300, 2, 5, 7, 6  # an expert that every token chooses overflows its bucket by more than one block


def random_experts(num_tokens: int, k: int, seed: int = 7) -> jax.Array:
    """Distinct experts of a token, int32."""
    return jnp.argsort(jax.random.uniform(jax.random.key(seed), (num_tokens, E)), axis=1)[:, :k].astype(jnp.int32)


def _cases() -> dict[str, jax.Array]:
    drawn = random_experts(P, K)
    place = jnp.arange(P)[:, None] * K + jnp.arange(K)
    return {
        "random": drawn,
        "all on one pair": jnp.tile(jnp.array([[1, 3]], jnp.int32), (P, 1)),
        "two experts empty": jnp.tile(jnp.array([[0, 2], [1, 0], [2, 1]], jnp.int32), (P // 3, 1)),
        "some absent": jnp.where(place % 3 == 0, E, drawn),
        "an overflowing expert and absent ones": jnp.where(jnp.arange(K) == jnp.arange(P)[:, None] % K, 4, E),
        "tokens with none": jnp.where(jnp.arange(P)[:, None] % 4 == 1, E, drawn),
        "all absent": jnp.full((P, K), E, jnp.int32),
        "one token": drawn[:1],
        "one token, absent in front": jnp.array([[E, 2]], jnp.int32),
        "one token with none": jnp.full((1, K), E, jnp.int32),
        "one expert each": random_experts(P, 1),
    }


CASES = _cases()


def rows(num_tokens: int) -> int:
    """How many rows the tokens make where a dispatch wants rows."""
    return 3 if num_tokens % 3 == 0 else 1


def capacity_of_every_token(x, weights, experts, w_in, w_out, *, combine=True):
    """`capacity_dispatch` with room for all, on flat tokens."""
    B, T = rows(len(x)), len(x) // rows(len(x))
    x, weights, experts = (a.reshape(B, T, -1) for a in (x, weights, experts))
    y = capacity_dispatch(x, weights, experts, w_in, w_out, T, combine=combine)
    return y.reshape(B * T, *y.shape[2:])


DISPATCHES = {name: functools.partial(grouped_experts, implementation=name) for name in IMPLEMENTATIONS}
DISPATCHES |= {"dense": dense_dispatch, "capacity": capacity_of_every_token}
FAST = [name for name in DISPATCHES if name != "dense"]
INTERPRETED = ("pallas_gpu", "pallas_tpu")  # kernels that take seconds to compile here, for every shape
SLOWEST = "pallas_gpu"  # of them, by its interpreter: a minute and a half a case


def on_each(names, cases=("random",), combines=(True, False), slowest=False) -> list:
    """Parameters (name, case, combine). Interpreted kernels have one case uncombined, and are slow but for one shape.

    slowest: whether the slowest has its one case; others of its kernels are in `tests/kernels`.
    """
    found = []
    for name, case, combine in itertools.product(names, cases, combines):
        if name == SLOWEST and not (slowest and combine and case == "some absent"):
            continue
        if name in INTERPRETED and not combine and case != "some absent":
            continue
        slow = name in INTERPRETED and not (combine and CASES[case].shape == (P, K) and name != SLOWEST)
        marks = pytest.mark.slow if slow else ()
        found.append(pytest.param(name, case, combine, marks=marks, id=f"{name}-{case}-{combine}"))
    return found


def operands(num_tokens: int, k: int = K, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, weights, w_in, w_out."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (num_tokens, D), dtype)
    weights = jax.random.uniform(keys[1], (num_tokens, k), minval=0.2)
    return x, weights, jax.random.normal(keys[2], (E, D, 2, F), dtype), jax.random.normal(keys[3], (E, F, D), dtype)


def outputs_and_gradients(dispatch):
    """Jitted: x, weights, experts, w_in, w_out -> output, and the gradients of a fixed sum of it."""

    def loss(x, weights, experts, w_in, w_out):
        y = dispatch(x, weights, experts, w_in, w_out)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    def both(*args):
        gradients, y = jax.grad(loss, argnums=(0, 1, 3, 4), has_aux=True)(*args)
        return y, gradients

    return jax.jit(both)


@functools.cache
def _compiled(name: str, combine: bool):
    return outputs_and_gradients(functools.partial(DISPATCHES[name], combine=combine))


def run(name: str, experts: jax.Array, combine: bool = True, given=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output and gradients by operand."""
    x, weights, w_in, w_out = operands(*experts.shape) if given is None else given
    y, gradients = jax.device_get(_compiled(name, combine)(x, weights, experts, w_in, w_out))
    return y, dict(zip(("x", "weights", "w_in", "w_out"), gradients, strict=True))
