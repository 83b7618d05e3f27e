"""Compiles the attention kernels for a GPU that is not here, forward and backward; prints one JSON object a kernel.

.venv/bin/python tests/kernels/compile_gpu_attention.py h100 4096,128,128,512 32768,192,128,4096

A case is length, width of keys, width of values, window (0: none); and a dtype, which brings a soft-cap with it, if it
is not bfloat16 without one. What Pallas prints of each kernel (PTX, and the assembler's report) is read off the
process's own output. Runs in a process of its own: the compiler reads the environment once.
"""

import json
import os
import re
import sys
import tempfile
from typing import Any

from dsv3_jax.planning.topologies import gpu_topology, on_one_device, prepare_gpu_compiler


def read_report(text: str) -> list[dict]:
    """Of each kernel that was compiled: registers spilled (bytes), matrix instructions, and whether the assembler makes
    them wait for one another, of any kernel."""
    matrix_instructions: dict[str, int] = {}
    for ptx in text.split(".visible .entry ")[1:]:
        matrix_instructions[ptx.split("(")[0].strip()] = ptx.count("wgmma.mma_async")
    kernels = []
    for report in text.split("Compiling entry function '")[1:]:
        name = report.split("'")[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills, report[:500]
        found = {"spills": int(spills[1]), "wgmma": matrix_instructions.get(name, 0)}
        kernels.append({"kernel": name, **found, "serialized": "wgmma.mma_async instructions are serialized" in text})
    return kernels


def compile_reported(function, *args) -> tuple[Any, list[dict]]:
    """The compiled function, and `read_report` of what was printed meanwhile: from C++, so descriptors are turned."""
    import jax

    with tempfile.TemporaryFile() as printed:
        kept = os.dup(1), os.dup(2)
        os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
        try:
            compiled = jax.jit(function).lower(*args).compile()
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        printed.seek(0)
        return compiled, read_report(printed.read().decode(errors="replace"))


def main(kind: str, cases: list[str]) -> None:
    prepare_gpu_compiler(kind, dump_ptx=True)
    import jax
    import jax.numpy as jnp

    from dsv3_jax import config as c
    from dsv3_jax.kernels.windowed_attention.call import Call
    from dsv3_jax.kernels.windowed_attention.pallas_gpu import gpu_attention
    from dsv3_jax.ops.patterns import Place

    jax.config.update("jax_enable_compilation_cache", False)
    sharding = on_one_device(gpu_topology(kind))
    for case in cases:
        sizes, (dtype, *_) = case.split(",")[:4], (*case.split(",")[4:], "bfloat16")
        T, N, M, window = map(int, sizes)
        softcap = 30.0 if len(case.split(",")) > 4 else None
        pattern = c.Windowed(window, (0,)) if window else c.Full()

        def loss(q, k, v, position, segment, pattern=pattern, scale=N**-0.5, softcap=softcap):
            call = Call(q, k, v, Place(position, segment), pattern, scale, softcap=softcap)
            out, lse = gpu_attention(call, interpret=False)
            return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(lse)

        def shape(*sizes, dtype=dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        tokens = shape(1, T, dtype=jnp.int32)
        args = shape(1, T, 2, N), shape(1, T, 1, N), shape(1, T, 1, M), tokens, tokens
        compiled, kernels = compile_reported(jax.grad(loss, argnums=(0, 1, 2)), *args)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(json.dumps({"case": case, "temporary": temporary, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
