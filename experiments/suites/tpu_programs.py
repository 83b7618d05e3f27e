"""Compiles one contender's attention, forward and backward, for a TPU, and leaves the compiler's schedule in a folder.

python -m experiments.suites.tpu_programs v5p ours 32768 512 512 128 DIR

Chip, contender (of CONTENDERS), length, window (0: none), block, chunk (of ours), folder.

A process of its own: the compiler reads its environment once.
"""

import functools
import os
import pathlib
import sys

from dsv3_jax.planning.topologies import on_one_device, prepare_tpu_compiler, tpu_topology
from dsv3_jax.planning.tpu_schedule import dump_flags

WIDTH = 128  # of a head


def main(kind: str, contender: str, length: int, window: int, block: int, chunk: int, folder: str) -> None:
    """Compiles; the schedule is in `folder`."""
    os.environ["LIBTPU_INIT_ARGS"] = dump_flags(pathlib.Path(folder))
    prepare_tpu_compiler(kind)
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_compilation_cache", False)
    sharding = on_one_device(tpu_topology(kind))
    attend, shape = CONTENDERS[contender](length, window, block, chunk)

    def loss(*inputs):
        return jnp.sum(jnp.square(attend(*inputs).astype(jnp.float32)))

    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)] * 3
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()


def _ours(length: int, window: int, block: int, chunk: int):
    import jax.numpy as jnp

    from dsv3_jax.config import Full, Windowed
    from dsv3_jax.kernels.windowed_attention.call import Call
    from dsv3_jax.kernels.windowed_attention.pallas_tpu import Blocks, tpu_attention
    from dsv3_jax.ops.patterns import Place

    pattern, blocks = Windowed(window) if window else Full(), Blocks(block, block, chunk)

    def attend(q, k, v):
        place = Place(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        return tpu_attention(Call(q, k, v, place, pattern, WIDTH**-0.5), blocks=blocks, interpret=False)[0]

    return attend, (1, length, 1, WIDTH)


def _splash(length: int, window: int, block: int, _: int, one_backward: bool = False):
    from experiments.peers.splash_attention import make_attention

    return make_attention(length, window, block, one_backward=one_backward), (1, length, WIDTH)


def _tokamax(length: int, window: int, block: int, _: int):
    from experiments.peers.tokamax_splash_attention import make_attention

    return make_attention(length, window, block), (1, length, WIDTH)


CONTENDERS = {
    "ours": _ours,
    "splash": _splash,
    "splash, fused": functools.partial(_splash, one_backward=True),
    "tokamax": _tokamax,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]), folder=sys.argv[7])  # type: ignore[call-arg]
