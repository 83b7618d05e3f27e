"""Grouped matmul: ours against XLA's ragged_dot, megablox and tokamax, a product alone and the routed SwiGLU experts.

All groups have rows, of a random routing; forward, and forward with backward, which is the gradient of all operands.
What rows are compared with is measured first: the rate of a large plain matmul.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError
from experiments.suites import Case, launched, launches, matmul_rate

UNIT = "GFLOP/s"


class Sizes(NamedTuple):
    """tokens, K of E experts each, as a device holds them; [D, 2F] and [F, D]. matmul: the side of a square matrix."""

    tokens: tuple[int, ...]
    K: int
    E: int
    D: int
    F: int
    dtype: str
    matmul: int


SIZES = {
    "cpu": Sizes((256, 2048), 4, 16, 256, 128, "float32", 2048),
    # DeepSeek-V3's experts, 256 over eight devices.
    "gpu": Sizes((4096, 512), 8, 32, 7168, 2048, "bfloat16", 8192),
    "tpu": Sizes((4096, 512), 8, 32, 7168, 2048, "bfloat16", 8192),
}
MADE_FOR = {"bucketed": "cpu", "pallas_gpu": "gpu", "pallas_tpu": "tpu"}  # elsewhere slow, or interpreted
PEERS = {  # module with matmul(x_ND, w_EDF, group_sizes_E), and the platforms it has a kernel for
    "megablox": ("experiments.peers.megablox", ("tpu",)),
    "tokamax": ("experiments.peers.tokamax_ragged_dot", ("gpu", "tpu")),
}
XLA = "XLA ragged_dot"


def implementations(platform: str, dtype: Any) -> list[str]:
    """Ours that run at real speed, the platform's default first. XLA's and the oracle are not among them."""
    from dsv3_jax.kernels.grouped_matmul import IMPLEMENTATIONS, default_implementation

    names = [name for name in IMPLEMENTATIONS if MADE_FOR.get(name) == platform]
    return sorted(names, key=lambda name: name != default_implementation(dtype))


def peers(platform: str, notes: list[str]) -> dict[str, Callable]:
    """Grouped matmuls of others by name; notes say who is left out."""
    import jax

    found: dict[str, Callable] = {XLA: jax.lax.ragged_dot}
    for name, (module, platforms) in PEERS.items():
        if platform not in platforms:
            notes.append(f"{name} left out: no kernel for {platform}")
            continue
        try:
            found[name] = importlib.import_module(module).matmul
        except ImportError as error:
            notes.append(f"{name} left out: {error}")
    return found


def operands(sizes: Sizes, tokens: int, seed: int = 0) -> tuple[Any, ...]:
    """x_PD, weights_PK float32, experts_PK, w_in_ED2F, w_out_EFD."""
    import jax
    import jax.numpy as jnp

    _, K, E, D, F, dtype, _ = sizes
    keys = jax.random.split(jax.random.key(seed), 5)
    experts_PK = jax.lax.top_k(jax.random.uniform(keys[0], (tokens, E)), K)[1].astype(jnp.int32)
    weights_PK = jax.nn.softmax(jax.random.normal(keys[1], (tokens, K)))
    x_PD = jax.random.normal(keys[2], (tokens, D), dtype)
    w_in_ED2F = jax.random.normal(keys[3], (E, D, 2, F), dtype) * D**-0.5
    return x_PD, weights_PK, experts_PK, w_in_ED2F, jax.random.normal(keys[4], (E, F, D), dtype) * F**-0.5


def timed(function: Callable, inputs: tuple, differentiable: tuple[int, ...]) -> Callable[[], object]:
    """A call of what is compiled. differentiable: operands whose gradients are asked for; none: forward."""
    import jax
    import jax.numpy as jnp

    def loss(*inputs):
        y = function(*inputs)
        return 0.5 * jnp.sum(jnp.square(y.astype(jnp.float32))), y  # its gradient depends on y

    step = jax.jit(jax.grad(loss, argnums=differentiable, has_aux=True) if differentiable else function)
    return lambda: step(*inputs)


def _cases(sizes: Sizes, tokens: int, names: list[str], others: dict[str, Callable]) -> Iterator[tuple]:
    """Name, FLOPs of a forward pass, operands, those with gradients, contenders."""
    import jax.numpy as jnp

    from dsv3_jax.kernels.grouped_matmul import grouped_experts, pick_matmul
    from dsv3_jax.ops.dispatch import grouped_dispatch, sort_by_expert

    _, K, E, D, F, dtype, _ = sizes
    x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD = operands(sizes, tokens)
    rows, by_expert = tokens * K, sort_by_expert(experts_PK.reshape(-1), E)
    x_ND = jnp.take(x_PD, by_expert.order_N // K, axis=0)
    matmuls = {f"dsv3_jax, {name}": pick_matmul(name, dtype) for name in names} | others
    gate_up = x_ND, w_in_ED2F.reshape(E, D, 2 * F), by_expert.sizes_E
    yield f"{rows} rows, {D} to {2 * F}", 4 * rows * D * F, gate_up, (0, 1), matmuls
    down = x_ND[:, :F], w_out_EFD, by_expert.sizes_E
    yield f"{rows} rows, {F} to {D}", 2 * rows * D * F, down, (0, 1), matmuls
    routed: dict[str, Callable] = {
        f"dsv3_jax, {name}": functools.partial(grouped_experts, implementation=name) for name in names
    }
    routed |= {name: functools.partial(grouped_dispatch, grouped_matmul=matmul) for name, matmul in others.items()}
    experts = x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD
    yield f"{tokens} tokens, {K} of {E} experts", 6 * rows * D * F, experts, (0, 1, 3, 4), routed


def cases(config_path: str | None) -> tuple[Iterator[Case], list[str]]:
    """Cases, made when they are asked for; notes, which grow with them, say who is missing and why.

    Raises:
      ConfigError: a config, which this suite has no use for.
    """
    import jax

    if config_path:
        raise ConfigError(f"--config={config_path}: --suite=grouped_matmul has sizes of its own; leave --config out")
    platform = jax.default_backend()
    sizes, threads = SIZES[platform], len(os.sched_getaffinity(0))
    rate = matmul_rate(sizes.matmul, sizes.dtype)
    notes = [
        f"{sizes.dtype}, {threads} threads; measured first: a matmul of {sizes.matmul}², {rate / 1e12:.3g} TFLOP/s. "
        "FLOPs are those of the rows; backward counts twice forward",
    ]
    names, others = implementations(platform, sizes.dtype), peers(platform, notes)
    if not names:
        notes.append(f"dsv3_jax left out: no kernel of its own for {platform}")

    def each() -> Iterator[Case]:
        for tokens in sizes.tokens:
            for name, flops, inputs, differentiable, contenders in _cases(sizes, tokens, names, others):
                for gradients in (False, True):
                    title = f"{name}, forward{' and backward' if gradients else ''}"
                    work, calls, repeats = flops * (3 if gradients else 1), {}, 1
                    for who, function in contenders.items():
                        try:
                            call = timed(function, inputs, differentiable if gradients else ())
                            repeats = repeats if calls else launches(call)
                            contender = launched(call, repeats)
                            contender()
                            calls[who] = contender
                        except Exception as error:  # as for want of memory
                            if who.startswith("dsv3_jax"):
                                raise
                            reason = (str(error).splitlines() or [""])[0][:200]
                            notes.append(f"{title}: {who} left out: {type(error).__name__}: {reason}")
                    yield Case(title, work / 1e9, calls, {"of matmul peak": work / rate}, repeats)

    return each(), notes
