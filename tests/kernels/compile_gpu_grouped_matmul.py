"""Compiles the routed experts for a GPU that is not here, forward and backward; prints one JSON object a case.

.venv/bin/python tests/kernels/compile_gpu_grouped_matmul.py h100 4096,8,32,7168,2048 300,2,5,7,6,float16

A case is tokens, experts a token, experts on the GPU, D, F; then the dtype, if it is not bfloat16; then that of 8-bit
matrices, forward alone. Runs in a process of its own: the compiler reads the environment once.
"""

import json
import math
import re
import sys

from dsv3_jax.planning.topologies import gpu_topology, on_one_device, prepare_gpu_compiler
from tests.kernels.compile_gpu_attention import compile_reported


def main(kind: str, cases: list[str]) -> None:
    prepare_gpu_compiler(kind, dump_ptx=True)
    import jax
    import jax.numpy as jnp

    from dsv3_jax.kernels.grouped_matmul import Quantized
    from dsv3_jax.kernels.grouped_matmul.pallas_gpu import gpu_experts

    jax.config.update("jax_enable_compilation_cache", False)
    sharding = on_one_device(gpu_topology(kind))
    for case in cases:
        *sizes, dtype, quantized = [*case.split(","), *(["bfloat16", ""][case.count(",") - 4 :])]
        P, K, E, D, F = map(int, sizes)

        def shape(*sizes, dtype=dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        def matrices(*sizes, E=E, quantized=quantized):
            return Quantized(shape(*sizes, dtype=quantized), shape(E, 1, *sizes[2:], dtype=jnp.float32))

        def loss(x, weights, experts, w_in, w_out):
            y = gpu_experts(x, weights, experts, w_in, w_out, interpret=False)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        tokens = shape(P, D), shape(P, K, dtype=jnp.float32), shape(P, K, dtype=jnp.int32)
        function, weights = (loss, matrices) if quantized else (jax.grad(loss, argnums=(0, 1, 3, 4)), shape)
        compiled, kernels = compile_reported(function, *tokens, weights(E, D, 2, F), weights(E, F, D))
        text = compiled.as_text() or ""
        entry = text[text.index("\nENTRY") :]  # what is between two instructions there is in memory
        shapes = [[int(size) for size in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", entry)]
        largest = max(map(math.prod, shapes))
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(json.dumps({"case": case, "temporary": temporary, "float32": largest, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
