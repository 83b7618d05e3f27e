"""Compiles the routed experts for a TPU that is not here, forward and backward; prints one JSON object a case.

.venv/bin/python tests/kernels/compile_grouped_matmul.py v5p 4096,8,32,7168,2048 512,2,4,256,96,float32

A case is tokens, experts a token, experts on the chip, D, F; then the dtype of x, and of the weights if they are
quantized. Runs in a process of its own: the compiler reads the environment once.
"""

import json
import math
import re
import sys
import time

from dsv3_jax.planning.topologies import on_one_device, prepare_tpu_compiler, tpu_topology


def main(kind: str, cases: list[str]) -> None:
    prepare_tpu_compiler(kind)
    import jax
    import jax.numpy as jnp

    from dsv3_jax.kernels.grouped_matmul.pallas_tpu import tpu_experts
    from dsv3_jax.kernels.grouped_matmul.quantized import Quantized

    jax.config.update("jax_enable_compilation_cache", False)
    sharding = on_one_device(tpu_topology(kind))
    for case in cases:
        *sizes, dtype, stored = case.split(",") + ["bfloat16", ""][case.count(",") - 4 :]
        P, K, E, D, F = map(int, sizes)

        def shape(*sizes, dtype=dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        def weights(*sizes, shape=shape, stored=stored):
            if not stored:
                return shape(*sizes)
            scale = shape(sizes[0], 1, *sizes[2:], dtype=jnp.float32)
            return Quantized(shape(*sizes, dtype=stored), scale)

        def loss(x, weights, experts, w_in, w_out):
            y = tpu_experts(x, weights, experts, w_in, w_out, interpret=False)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        tokens = shape(P, D), shape(P, K, dtype=jnp.float32), shape(P, K, dtype=jnp.int32)
        gradients = jax.grad(loss, argnums=(0, 1) if stored else (0, 1, 3, 4))
        start = time.perf_counter()
        compiled = jax.jit(gradients).lower(*tokens, weights(E, D, 2, F), weights(E, F, D)).compile()
        seconds = time.perf_counter() - start
        text, memory = compiled.as_text() or "", compiled.memory_analysis()
        entry = text[text.index("\nENTRY") :]  # what is between two instructions there is in memory
        shapes = [[int(size) for size in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", entry)]
        wide = [shape for shape in shapes if math.prod(shape) >= P * K * min(D, F)]
        found = {
            "case": case,
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
            "flops": compiled.cost_analysis().get("flops"),
            "temporary": memory.temp_size_in_bytes,
            "float32": wide,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
