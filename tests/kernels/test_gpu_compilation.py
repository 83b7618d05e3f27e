"""The kernels compiled for an H100 by its own compiler and assembler, with no GPU at hand."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dsv3_jax.planning.topologies import has_gpu_compiler

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the compiler for GPUs is not installed: make peers"),
]


def reported(arguments: list[str]) -> dict[str, dict]:
    """Case -> what compiler and assembler say of it, by a Python program that prints a JSON object a case."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def compiled(script: str, *cases: str) -> dict[str, dict]:
    return reported([str(FOLDER / script), "h100", *cases])


def test_kernels_multiply_on_tensor_cores_spill_nothing_and_need_no_memory_of_the_square():
    cases = "131072,128,128,4096", "131072,192,128,512", "8192,64,64,0"
    found = compiled("compile_gpu_attention.py", *cases)
    for case, line in found.items():
        T, N, M, _ = map(int, case.split(","))
        assert {kernel["kernel"].split("_")[0] for kernel in line["kernels"]} == {"forward", "dq", "dkv"}
        for kernel in line["kernels"]:
            assert kernel["spills"] == 0 and not kernel["serialized"], (case, kernel)
            # Scores contract N and the product after them a block of keys, 16 elements an instruction.
            assert kernel["wgmma"] >= N // 16 + 4, (case, kernel)
        # Outputs, numbers of each query, and what the global keys take in plain JAX.
        assert line["temporary"] < 16 * T * 2 * 128, (case, line["temporary"])


def test_odd_shapes_compile_and_spill_little():
    """float16, a soft-cap, rows that fill no block, narrow heads; at most 32 bytes, and 100 at 256/64 with jax 0.12."""
    cases = (
        "300,24,16,90,float16",
        "1000,192,128,0,float16",
        "2,160,96,80",
        "500,64,256,0",
        "500,256,64,0",
    )
    for case, line in compiled("compile_gpu_attention.py", *cases).items():
        assert len(line["kernels"]) == 3
        limit = 32 if case != cases[-1] or jax.__version_info__ < (0, 12) else 100
        assert all(kernel["spills"] <= limit for kernel in line["kernels"]), (case, line["kernels"])


def test_experts_multiply_on_tensor_cores_spill_nothing_and_hold_no_rows_in_float32():
    """32 of DeepSeek-V3's 256 experts on a GPU, 8 of them a token; and small and odd ones in float16."""
    eight_bits = [
        f"{case},{dtype}"
        for case in ("512,8,32,7168,2048,bfloat16", "300,2,5,7,6,float16")
        for dtype in ("int8", "float8_e4m3fn")
    ]
    found = compiled("compile_gpu_grouped_matmul.py", "4096,8,32,7168,2048", "300,2,5,7,6,float16", *eight_bits)
    for case, line in found.items():
        names = {kernel["kernel"].split("_mosaic")[0] for kernel in line["kernels"]}
        backward = set() if case in eight_bits else {"grouped_groups"}
        assert names == {"grouped_rows", "grouped_swiglu"} | backward, names
        for kernel in line["kernels"]:
            assert kernel["spills"] == 0 and not kernel["serialized"], (case, kernel)
            assert kernel["wgmma"] >= 2 * 64 // 16, (case, kernel)  # two tiles, 16 deep an instruction
    P, K, E, D, F = 4096, 8, 32, 7168, 2048
    line = found["4096,8,32,7168,2048"]
    assert P * K <= line["float32"] < P * K * min(D, F), "numbers of each row, and no rows"
    assert line["temporary"] < 2 * (E * D * 2 * F + 4 * P * K * D)
    for case in eight_bits[:2]:
        assert found[case]["temporary"] < E * D * F / 4, "no matrix is held in 16 bits"


PROGRAM = """
import json, sys
from dsv3_jax.planning.topologies import gpu_topology, on_one_device, prepare_gpu_compiler
from tests.kernels.compile_gpu_attention import compile_reported
prepare_gpu_compiler("h100", dump_ptx=True)
import jax, jax.numpy as jnp
from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.kernels.decode_attention.pallas_gpu import gpu_decode_attention
jax.config.update("jax_enable_compilation_cache", False)
sharding = on_one_device(gpu_topology("h100"))
def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
for T, S, H, G, N, M in ((1, 32768, 128, 1, 576, 512), (4, 32768, 128, 1, 576, 512), (1, 131072, 32, 8, 128, 128),
                         (1, 33000, 16, 8, 256, 256)):
    def run(q, bias, k, *v):  # a cache has the heads of a token in one dimension
        values = v[0].reshape(2, S, G, M) if v else M
        return gpu_decode_attention(Call(q, k.reshape(2, S, G, N), values, bias, 0.1), interpret=False)
    arrays = [shape(2, S, G * N)] if G == 1 else [shape(2, S, G * N), shape(2, S, G * M)]
    compiled, kernels = compile_reported(run, shape(2, T, H, N), shape(2, T, S, dtype=jnp.float32), *arrays)
    print(json.dumps({"case": f"{T},{S},{N}", "temporary": compiled.memory_analysis().temp_size_in_bytes,
                      "cache": sum(x.size * 2 for x in arrays), "kernels": kernels}), flush=True)
"""


def test_decoding_multiplies_on_tensor_cores_spills_nothing_and_copies_no_cache():
    for case, line in reported(["-c", PROGRAM]).items():
        (kernel,) = line["kernels"]
        assert kernel["spills"] == 0 and not kernel["serialized"] and kernel["wgmma"] > 0, (case, kernel)
        assert line["temporary"] < 0.5 * line["cache"], (case, line)
