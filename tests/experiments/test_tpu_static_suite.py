"""benchmark.py --suite=tpu_static: schedules are read off the compiler, and counted as often as they run."""

import importlib.util

import pytest

from dsv3_jax import config as c
from dsv3_jax.planning.tpu_schedule import Region, _by_frequency, _regions
from experiments.suites import tpu_static

BUNDLES = """
   0x0   :  { %1 = sst } /* Start region 1 */
   0x1 LB: > { %2 = scalar } /* Start region 2 */
   0x2   : > { %3 = vst } /* Start region 3 */
   0x3   : > { %4 = vst } /* End region 3 */
   0x4   : > { %5 = vmatmul } /* Start region 4 */
   0x5   : > { %6 = vmatmul } /* End region 4 */
   0x6   : > { %7 = vst } /* Start region 5 :: End region 5 */
   0x7   : > { %8 = sadd } /* End region 2 :: End region 1 */
"""
ROWS = [
    "0 0 0 0 0 0 0 0 0 1",
    "0 0 0 0 0 0 0 0 0 2",
    "0 0 0 0 0 0 0 9 0 0",
    "0 0 0 0 0 0 0 1 0 0",
    "4 0 2 0 1 0 0 0 0 0",
    "3 0 0 0 0 0 1 0 1 0",
    "0 0 0 0 0 0 0 9 0 0",
    "0 0 0 0 0 0 0 0 0 1",
]


@pytest.mark.quick
def test_parts_of_a_kernel_are_told_apart_by_what_they_do():
    regions = _regions(BUNDLES, "== CAPACITY:\nMXU …\n== UTILIZATION:\n" + "\n".join(ROWS) + "\n")
    assert [region.bundles for region in regions] == [1, 2, 2, 2, 1]
    kernel = _by_frequency("a", regions)
    assert (kernel.step, kernel.first, kernel.last) == (3, 2, 1)
    (body,) = kernel.bodies
    assert isinstance(body, Region) and body.bundles == 2
    assert {unit: body.slots[unit] for unit in ("mxu", "valu", "eup", "fill", "spill")} == {
        "mxu": 7, "valu": 2, "eup": 1, "fill": 1, "spill": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("libtpu", "tokamax"))), reason="libtpu, tokamax: make peers")
def test_every_contender_is_compiled_and_counted(monkeypatch):
    monkeypatch.setattr(tpu_static, "LENGTH", 2048)
    monkeypatch.setattr(tpu_static, "KINDS", ("v5e",))
    monkeypatch.setattr(tpu_static, "PROBLEMS", ((512, 256),))
    rows, _ = tpu_static.table(None)
    assert [(row["contender"], row["pass"]) for row in rows] == [
        ("ours", "forward"),
        ("ours", "backward"),
        ("splash", "forward"),
        ("splash", "dq"),
        ("splash", "dk and dv"),
        ("splash", "backward"),
        ("splash, fused", "backward"),
        ("tokamax", "forward"),
        ("tokamax", "backward"),
    ]
    for row in rows:
        if "a step" in row:
            bodies = [int(x) for x in row["a step"].split(" / ")]
            assert len(bodies) == {"ours": 4, "tokamax": 2}.get(row["contender"], 1) and min(bodies) > 50
            # 8 query blocks; 3 key blocks each, but for the first two
            assert 21 * min(bodies) < row["bundles · trips"] < 24 * (max(bodies) + row["around it"] + row["an owner"])
    total = {(row["contender"], row["pass"]): row["bundles · trips"] for row in rows}
    assert total["splash", "backward"] == total["splash", "dq"] + total["splash", "dk and dv"]
    for row in rows:
        if row["pass"] in ("forward", "backward"):
            assert row["of splash"] == row["bundles · trips"] / total["splash", row["pass"]]
        else:
            assert "of splash" not in row


@pytest.mark.quick
def test_a_config_is_refused():
    with pytest.raises(c.ConfigError, match="--suite=tpu_static has sizes of its own"):
        tpu_static.table("configs/tiny.py")
