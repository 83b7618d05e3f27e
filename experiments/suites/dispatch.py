"""The routed experts alone: the grouped dispatch of this platform against the others, the same routing and weights.

A step is the output and the gradients of tokens, weights and both matrices; a decoding step is the output alone.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3_jax.config import ConfigError
from experiments.suites import Case

if TYPE_CHECKING:
    import jax

UNIT = "tokens/s"
FACTOR = 1.25  # of the capacity dispatch
CALLS = 100  # decoding steps timed as one


@dataclasses.dataclass(frozen=True)
class Shape:
    """B rows of T tokens, K of E experts each, [D, 2F] and [F, D]; `skew` makes expert e (1 + e)^-skew as popular."""

    name: str
    B: int
    T: int
    K: int
    E: int
    D: int
    F: int
    skew: float = 0.0
    gradients: bool = True


SHAPES = (
    Shape("4 of 16", 8, 256, K=4, E=16, D=256, F=128),
    Shape("4 of 16, skewed", 8, 256, K=4, E=16, D=256, F=128, skew=1.0),
    Shape("2 of 128", 8, 256, K=2, E=128, D=256, F=64),
    Shape("decode, 4 of 16", 4, 1, K=4, E=16, D=256, F=128, gradients=False),
)


def operands(shape: Shape, seed: int = 0) -> tuple["jax.Array", ...]:
    """x_PD, weights_PK, experts_PK, w_in, w_out, float32."""
    import jax
    import jax.numpy as jnp

    P, K, E, D, F = shape.B * shape.T, shape.K, shape.E, shape.D, shape.F
    keys = jax.random.split(jax.random.key(seed), 5)
    popularity_E = -shape.skew * jnp.log1p(jnp.arange(E))
    experts_PK = jax.lax.top_k(popularity_E + jax.random.gumbel(keys[0], (P, E)), K)[1].astype(jnp.int32)
    weights_PK = jax.nn.softmax(jax.random.normal(keys[1], (P, K)))
    x_PD, w_in_ED2F = jax.random.normal(keys[2], (P, D)), jax.random.normal(keys[3], (E, D, 2, F)) * D**-0.5
    return x_PD, weights_PK, experts_PK, w_in_ED2F, jax.random.normal(keys[4], (E, F, D)) * F**-0.5


def contenders(shape: Shape) -> dict[str, Callable]:
    """Name -> dispatch of flat tokens; the platform's grouped dispatch is the first."""
    import jax.numpy as jnp

    from dsv3_jax.kernels.grouped_matmul import default_implementation, grouped_experts
    from dsv3_jax.ops.dispatch import capacity_dispatch, capacity_of, dense_dispatch, within_capacity

    B, T, K, E = shape.B, shape.T, shape.K, shape.E

    def capacity(x_PD, weights_PK, experts_PK, w_in, w_out):
        slots = capacity_of(FACTOR, T, K, E)
        x_BTD, weights_BTK, experts_BTK = (a.reshape(B, T, -1) for a in (x_PD, weights_PK, experts_PK))
        keep_BTK = within_capacity(experts_BTK, E, slots, jnp.ones((B, T), bool))
        y_BTD = capacity_dispatch(x_BTD, weights_BTK, jnp.where(keep_BTK, experts_BTK, E), w_in, w_out, slots)
        return y_BTD.reshape(x_PD.shape)

    default = default_implementation(jnp.float32)
    other = "ragged_dot" if default == "bucketed" else "bucketed"
    grouped = {f"grouped, {name}": functools.partial(grouped_experts, implementation=name) for name in (default, other)}
    return grouped | {"dense": dense_dispatch, f"capacity {FACTOR}": capacity}


def timed(dispatch: Callable, shape: Shape) -> Callable[..., object]:
    """A call to time."""
    import jax
    import jax.numpy as jnp

    x, weights, experts, w_in, w_out = operands(shape)
    if not shape.gradients:
        forward = jax.jit(dispatch)

        def decode():
            for _ in range(CALLS):
                jax.block_until_ready(forward(x, weights, experts, w_in, w_out))

        return decode

    def loss(x, weights, w_in, w_out):
        y = dispatch(x, weights, experts, w_in, w_out)
        return 0.5 * jnp.sum(jnp.square(y)), y  # its gradient depends on y: nothing can be left out

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    return lambda: jax.block_until_ready(step(x, weights, w_in, w_out))


def cases(config_path: str | None) -> tuple[list[Case], list[str]]:
    """A case for each shape, and notes on loads and drops.

    Raises:
      ConfigError: a config, which this suite has no use for.
    """
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.ops.dispatch import capacity_of, within_capacity

    if config_path:
        raise ConfigError(f"--config={config_path}: --suite=dispatch has shapes of its own; leave --config out")
    found = []
    notes = [f"float32, {len(os.sched_getaffinity(0))} threads; decode: {CALLS} steps a call, no gradients"]
    for shape in SHAPES:
        B, T, K, E = shape.B, shape.T, shape.K, shape.E
        experts_PK = operands(shape)[2]
        load_E = np.bincount(np.asarray(experts_PK).reshape(-1), minlength=E)
        slots = capacity_of(FACTOR, T, K, E)
        keep = within_capacity(experts_PK.reshape(B, T, K), E, slots, jnp.ones((B, T), bool))
        notes.append(
            f"{shape.name}: {B} x {T} tokens, {K} of {E} experts, D = {shape.D}, F = {shape.F}; largest / mean load "
            f"{load_E.max() / load_E.mean():.2f}; a capacity of {slots} a row drops {1 - np.mean(keep):.1%}"
        )
        calls = {name: timed(dispatch, shape) for name, dispatch in contenders(shape).items()}
        found.append(Case(shape.name, B * T * (1 if shape.gradients else CALLS), calls))
    return found, notes
