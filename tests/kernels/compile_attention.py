"""Compiles the attention kernels for a TPU that is not here, forward and backward; prints one JSON object a case.

.venv/bin/python tests/kernels/compile_attention.py v5p 4096,128,128,512 32768,192,128,4096

A case is length, width of keys, width of values, window (0: none); and a dtype, which brings a soft-cap with it, if it
is not bfloat16 without one. Runs in a process of its own: the compiler reads the environment once.
"""

import json
import sys

from dsv3_jax.planning.topologies import on_one_device, prepare_tpu_compiler, tpu_topology


def main(kind: str, cases: list[str]) -> None:
    prepare_tpu_compiler(kind)
    import jax
    import jax.numpy as jnp

    from dsv3_jax import config as c
    from dsv3_jax.kernels.windowed_attention.call import Call
    from dsv3_jax.kernels.windowed_attention.pallas_tpu import tpu_attention
    from dsv3_jax.ops.patterns import Place

    jax.config.update("jax_enable_compilation_cache", False)
    sharding = on_one_device(tpu_topology(kind))
    for case in cases:
        sizes, (dtype, *_) = case.split(",")[:4], (*case.split(",")[4:], "bfloat16")
        T, N, M, window = map(int, sizes)
        softcap = 30.0 if len(case.split(",")) > 4 else None
        pattern = c.Windowed(window, (0,)) if window else c.Full()

        def loss(q, k, v, position, segment, pattern=pattern, scale=N**-0.5, softcap=softcap):
            place = Place(position, segment)
            out, lse = tpu_attention(Call(q, k, v, place, pattern, scale, softcap=softcap), interpret=False)
            return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(lse)

        def shape(*sizes, dtype=dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        tokens = shape(1, T, dtype=jnp.int32)
        args = shape(1, T, 2, N), shape(1, T, 1, N), shape(1, T, 1, M), tokens, tokens
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
        costs = compiled.cost_analysis()
        memory = compiled.memory_analysis()
        print(
            json.dumps(
                {
                    "case": case,
                    "kernels": (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"'),
                    "flops": costs.get("flops"),
                    "temporary": memory.temp_size_in_bytes,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
