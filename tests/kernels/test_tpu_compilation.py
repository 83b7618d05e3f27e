"""The kernels compiled for TPUs by their own compiler, with no TPU at hand."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "compile_attention.py"
ROOT = SCRIPT.parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make peers"),
]


def compiled(kind: str, *cases: str, script: pathlib.Path = SCRIPT) -> dict[str, dict]:
    """Case -> what the compiler says of it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), kind, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


LENGTHS = (4096, 32768, 131072)
MORE = {  # gradients of all 26,624 queries of two heads, 192 wide, just fit the chip; of 131,072 they do not
    "v5p": ("4096,192,128,512", "26624,192,128,0,bfloat16", "4096,256,256,0,bfloat16"),
    "v6e": ("32768,192,128,4096", "26624,192,128,0", "131072,192,128,0"),
}


@pytest.mark.parametrize("kind", MORE)
def test_kernels_compile_at_every_length_without_a_temporary_of_its_square(kind):
    found = compiled(kind, *(f"{T},128,128,512" for T in LENGTHS), *MORE[kind])
    for case, line in found.items():
        T = int(case.split(",")[0])
        assert line["kernels"] == (3 if case == "131072,192,128,0" else 2), case
        # Copies of the inputs, heads first, and rows of numbers: a byte for each pair of tokens would be T².
        assert line["temporary"] < 8 * T * 4 * 256, (case, line["temporary"])
    flops = [found[f"{T},128,128,512"]["flops"] for T in LENGTHS]
    assert flops[2] < 1.1 * 4 * flops[1] and flops[1] < 1.1 * 8 * flops[0]  # linear in length


def test_small_and_odd_shapes_compile():
    """As tests and small models have them: widths below the lanes, rows below a block, float32, a soft-cap."""
    cases = ("2,24,16,0", "300,24,16,90", "1024,64,64,128,float32", "4096,256,256,0,float32", "1024,64,64,100,bfloat16")
    assert all(line["kernels"] == 2 for line in compiled("v5e", *cases).values())


def test_kernels_compile_for_a_tpu7x_and_without_a_window():
    assert all(line["kernels"] == 2 for line in compiled("tpu7x", "4096,128,128,512", "4096,192,128,0").values())
