"""The kernels compiled for an H100 by its own compiler and assembler, with no GPU at hand."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.planning.topologies import has_gpu_compiler

SCRIPT = pathlib.Path(__file__).parent / "compile_gpu_attention.py"
ROOT = SCRIPT.parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the compiler for GPUs is not installed: make peers"),
]


def compiled(*cases: str) -> dict[str, dict]:
    """Case -> what compiler and assembler say of it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "h100", *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_kernels_multiply_on_tensor_cores_spill_nothing_and_need_no_memory_of_the_square():
    lengths, widths = (4096, 131072), ("128,128", "192,128")
    found = compiled(*(f"{T},{width},512" for T in lengths for width in widths), "32768,128,128,4096", "8192,64,64,0")
    for case, line in found.items():
        T, N, M, _ = map(int, case.split(","))
        assert {kernel["kernel"].split("_")[0] for kernel in line["kernels"]} == {"forward", "dq", "dkv"}
        for kernel in line["kernels"]:
            assert kernel["spills"] == 0 and not kernel["serialized"], (case, kernel)
            # Each product of the innermost step, 16 elements of what it contracts at a time.
            assert kernel["wgmma"] >= (N + M) // 16, (case, kernel)
        # Outputs, numbers of each query, and what the global keys take in plain JAX.
        assert line["temporary"] < 16 * T * 2 * 128, (case, line["temporary"])


def test_odd_shapes_compile_and_spill_little():
    """float16, a soft-cap, rows that fill no block, narrow heads; the widest heads with a soft-cap spill 32 bytes."""
    for case, line in compiled("300,24,16,90,float16", "1000,192,128,0,float16", "2,64,64,0").items():
        assert len(line["kernels"]) == 3
        assert all(kernel["spills"] <= 32 for kernel in line["kernels"]), case
