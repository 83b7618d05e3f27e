"""What the TPU compiler schedules for our attention kernels, splash attention's and tokamax's on the same problem.

Each contender is compiled for a TPU that is not here: one row of one head, bfloat16, causal, blocks of one size for
all. Bundles · trips is a floor on a call's cycles, without waits: no timing. Ours and tokamax's compute no mask where
two blocks see each other whole, ours half of a block where only half is seen; splash has one body for all.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from dsv3_jax.config import ConfigError, Full, Windowed

KINDS = ("v5p", "v6e")
LENGTH, CHUNK = 32768, 128  # chunks are ours
PROBLEMS = ((512, 512), (4096, 512), (4096, 1024))  # window, block
CONTENDERS = {
    "ours": ("forward", "backward"),
    "splash": ("forward", "dq", "dk and dv"),
    "splash, fused": ("backward",),  # its forward kernel is the same
    "tokamax": ("forward", "backward"),
}  # and their kernels
MXU_SLOTS = 4  # of a bundle, in the compiler's table


def table(config_path: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a chip, window, pass and contender; notes.

    Raises:
      ConfigError: a config, which this suite has no use for, or no compiler for TPUs.
    """
    if config_path:
        raise ConfigError(f"--config={config_path}: --suite=tpu_static has sizes of its own; leave --config out")
    contenders, rows = [name for name in CONTENDERS if name != "tokamax" or importlib.util.find_spec(name)], []
    for kind in KINDS:
        for window, block in PROBLEMS:
            problem, totals = {"chip": kind, "window": window, "block": block}, {}
            for contender in contenders:
                print(f"compiling {contender} for {problem}", file=sys.stderr, flush=True)
                found = _compiled(kind, contender, window, block)
                if "dq" in CONTENDERS[contender]:
                    both = sum(row["bundles · trips"] for row in found[1:])
                    found.append({"pass": "backward", "bundles · trips": both})
                for row in found:
                    totals[contender, row["pass"]] = row["bundles · trips"]
                    rows.append(problem | {"contender": contender} | row)
            for row in rows:
                if problem.items() <= row.items() and row["pass"] in ("forward", "backward"):
                    row["of splash"] = row["bundles · trips"] / totals["splash", row["pass"]]
    notes = [
        f"{LENGTH} tokens, one head of 128, bfloat16; static: bundles that the compiler scheduled, no timing",
        "a step: bundles of each body (blocks that see each other whole, in part, ours in two kinds of triangles too); "
        "MXU: share of its slots in them; spills + fills: vector registers to and from memory, a step",
        "splash, fused: one backward kernel that leaves a dq of each key block in memory; their sum is not counted",
        "tokamax: its backward kernel adds up dq in three buffers in memory, in bfloat16; their sum is not counted",
    ]
    return rows, notes if "tokamax" in contenders else [*notes[:-1], "tokamax left out: not installed (make peers)"]


def _compiled(kind: str, contender: str, window: int, block: int) -> list[dict[str, Any]]:
    from dsv3_jax.planning.tpu_schedule import read_schedules

    with tempfile.TemporaryDirectory() as folder:
        numbers = [str(x) for x in (LENGTH, window, block, CHUNK)]
        command = [sys.executable, "-m", "experiments.suites.tpu_programs", kind, contender, *numbers, folder]
        root = pathlib.Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"{contender} for {kind}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        kernels = {_pass(kernel.name, contender): kernel for kernel in read_schedules(pathlib.Path(folder))}
    rows = []
    for name in CONTENDERS[contender]:
        kernel, (owners, steps, trips) = kernels[name], _trips(contender, name, window, block)
        bodies = [body.bundles for body in kernel.bodies]
        work = sum(count * bundles for count, bundles in zip(trips, bodies, strict=True))
        total = steps * kernel.step + owners * (kernel.first + kernel.last) + work
        slots = {unit: sum(body.slots[unit] for body in kernel.bodies) for unit in ("mxu", "fill", "spill")}
        rows.append(
            {
                "pass": name,
                "a step": " / ".join(map(str, bodies)),
                "around it": kernel.step,
                "an owner": kernel.first + kernel.last,
                "MXU": slots["mxu"] / MXU_SLOTS / sum(bodies),
                "spills + fills": (slots["fill"] + slots["spill"]) // len(bodies),
                "bundles · trips": total,
            }
        )
    return rows


def _pass(kernel: str, contender: str) -> str:
    if "fwd" in kernel or "forward" in kernel:
        return "forward"
    return "backward" if "backward" in CONTENDERS[contender] else "dk and dv" if "dkv" in kernel else "dq"


def _trips(contender: str, name: str, window: int, block: int) -> tuple[int, int, list[int]]:
    """Owners, steps of the grid, and the pairs of blocks that each body runs on."""
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.kernels.windowed_attention.intervals import (
        LOWER,
        MASKED,
        UPPER,
        WHOLE,
        block_pairs,
        schedule_by_query,
        visible_interval,
    )
    from dsv3_jax.ops.patterns import Place

    pattern = Windowed(window) if window else Full()
    pairs = block_pairs(pattern, True, LENGTH, block, block)
    place = Place(jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32))
    owners, steps = LENGTH // block, len(pairs)
    if contender.startswith("splash"):  # its grid is as wide as the owner with most blocks
        return owners, owners * int(np.bincount(pairs[:, int(name in ("dk and dv", "backward"))]).max()), [steps]
    schedule = schedule_by_query(pairs, *visible_interval(pattern, True, place), block, block, CHUNK)
    whole, *others = (int(np.sum(schedule.kind_BS == kind)) for kind in (WHOLE, MASKED, LOWER, UPPER))
    return owners, steps, [whole, *others] if contender == "ours" else [whole, sum(others)]
