"""The grouped matmul kernels compiled for TPUs by their own compiler, with no TPU at hand."""

import pathlib

import pytest

from tests.kernels import test_tpu_compilation as attention

pytestmark = attention.pytestmark
SCRIPT = pathlib.Path(__file__).parent / "compile_grouped_matmul.py"
KERNELS = 6  # gate and up, the last product; the gradients of hidden units and of x, of each matrix


def compiled(kind: str, *cases: str) -> dict[str, dict]:
    return attention.compiled(kind, *cases, script=SCRIPT)


def test_the_experts_of_v3_compile_without_rows_in_float32():
    """32 of DeepSeek-V3's 256 experts on a device, 8 of them a token."""
    tokens, K, E, D, F = 4096, 8, 32, 7168, 2048
    (found,) = compiled("v5p", f"{tokens},{K},{E},{D},{F}").values()
    N = tokens * K
    assert found["kernels"] == KERNELS
    assert found["float32"] == []
    # w_in with the gates' columns together, and what is alive of x, y, their gradients and the hidden units.
    assert found["temporary"] < 2 * (E * D * 2 * F + 4 * N * D)
    assert found["flops"] == pytest.approx(3 * 6 * N * D * F, rel=0.01)


def test_small_and_odd_shapes_compile():
    """As tests and small models have them: widths below the lanes, rows below a tile, float32; one token of many."""
    cases = ("300,2,5,7,6", "300,2,5,7,6,float32", "512,2,4,256,200,float32", "1,8,256,1024,512")
    found = compiled("v5e", *cases)
    assert all(line["kernels"] == KERNELS for line in found.values())
    assert found["512,2,4,256,200,float32"]["float32"], "float32 rows are seen where there are any"


def test_eight_bit_experts_compile():
    """Those of V3, and small and odd ones in the other format; gradients of x and of the routing's weights."""
    cases = "512,8,32,7168,2048,bfloat16,float8_e4m3fn", "300,2,5,130,96,bfloat16,int8"
    for case, line in compiled("v6e", *cases).items():
        assert line["kernels"] == 4 and not line["float32"], case
