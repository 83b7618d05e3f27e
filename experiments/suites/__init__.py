"""What `benchmark.py` times: one module a suite, with UNIT and cases(); or with table(), where nothing is timed.

A suite may have plot(rows, path), which draws its rows beside --output.
"""

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Contenders that do the same `work`, in the suite's unit times seconds; ours is the first.

    limits: by name, the seconds that the work would take at some limit of the machine; rows give the share of it that
    each contender reaches. calls: how often a contender does the work when it is called (`launches`).
    """

    name: str
    work: float
    contenders: dict[str, Callable[..., object]]
    limits: Mapping[str, float] = MappingProxyType({})
    calls: int = 1


def launches(call: Callable[[], Any]) -> int:
    """How many calls, one launched after the other and waited for together, take 20 ms: on an accelerator a short call
    alone would be timed with what its launch takes. 1 on CPU. Calls twice."""
    import jax

    if jax.default_backend() == "cpu":
        return 1
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, min(100, round(0.02 / (time.perf_counter() - start))))


def launched(call: Callable[[], Any], calls: int) -> Callable[[], object]:
    """`call`, of what jax compiled, as a contender."""
    import jax

    def contender() -> object:
        for _ in range(calls - 1):
            call()
        return jax.block_until_ready(call())

    return contender


def rate(function: Callable, work: float, *inputs: Any) -> float:
    """`work` a second: the best of five, after three."""
    import jax

    run, times = jax.jit(function), []
    calls = launches(lambda: run(*inputs))
    contender = launched(lambda: run(*inputs), calls)
    for index in range(8):
        start = time.perf_counter()
        contender()
        times += [time.perf_counter() - start] if index > 2 else []
    return work * calls / min(times)


def matmul_rate(side: int, dtype: Any) -> float:
    """FLOP/s of a product of square matrices of random numbers: of ones it would be faster."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    return rate(jnp.matmul, 2 * side**3, x, x)
