"""The schedule that the TPU compiler made of a Pallas kernel, read from its dump: static figures, not timings.

Bundles are issued in order, one a cycle at best, so that bundles · trips is a floor on a call's cycles; waits for
memory and for the matrix unit come on top.
"""

import collections
import pathlib
import re
from typing import NamedTuple

# Columns of the compiler's table of utilization.
UNITS = ("mxu", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")


class Region(NamedTuple):
    """A run of bundles of one kernel: how many, and how many slots of each unit they use."""

    bundles: int
    slots: dict[str, int]


class KernelSchedule(NamedTuple):
    """A kernel with a loop over its grid, by how often its parts run.

    step: bundles at every step. first, last: at the first and the last step of an owner, whose results are kept on chip
    between. bodies: the variants of the work of a step, in the order of the program.
    """

    name: str
    step: int
    first: int
    last: int
    bodies: tuple[Region, ...]


def dump_flags(folder: pathlib.Path) -> str:
    """What LIBTPU_INIT_ARGS must hold before jax is imported."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read_schedules(folder: pathlib.Path) -> list[KernelSchedule]:
    """The kernels of a dump that multiply matrices, in the order in which they were compiled."""
    found = []
    for path in sorted(folder.glob("*-final_bundles.txt"), key=lambda path: int(path.name.split("-")[0])):
        if "schedule-analysis" not in path.name:
            stem, name = re.match(r"(\d+-(.*))-\d+-final_bundles", path.name).groups()  # type: ignore[union-attr]
            table = next(iter(folder.glob(f"{stem}-*final_hlo-static-per-bundle-utilization.txt")), None)
            regions = _regions(path.read_text(), table.read_text()) if table else []
            if any(region.slots["mxu"] for region in regions) and any("loop" in line for line in path.open()):
                found.append(_by_frequency(name, regions))
    return found


def _regions(bundles: str, table: str) -> list[Region]:
    """Leaf parts in the order of the program; a part ends where a region begins or ends."""
    used = [[int(x) for x in line.split()] for line in table.split("== UTILIZATION:\n")[1].splitlines() if line.strip()]
    order: list[str] = []
    counts: dict[str, collections.Counter[str]] = {}
    stack: list[str] = ["outside"]
    for line in bundles.splitlines():
        address = re.match(r"\s*(0x[0-9a-f]+)\s", line)
        if address is None:
            continue
        stack += re.findall(r"Start region (\d+)", line)
        name = stack[-1]
        if name not in counts:
            order.append(name)
            counts[name] = collections.Counter()
        counts[name]["bundles"] += 1
        index = int(address[1], 16)
        if index < len(used):
            counts[name].update(dict(zip(UNITS, used[index], strict=False)))
        for ended in re.findall(r"End region (\d+)", line):
            if ended in stack:
                stack.remove(ended)
    return [Region(counts[name].pop("bundles"), {unit: counts[name][unit] for unit in UNITS}) for name in order]


def _by_frequency(name: str, regions: list[Region]) -> KernelSchedule:
    """Parts with matrix products are bodies; other large parts that store vectors run once an owner, before the bodies
    to clear what is accumulated, after them to write it. The rest, which moves data and counts, runs at every step."""
    bodies = [index for index, region in enumerate(regions) if region.slots["mxu"]]
    once = [i for i, region in enumerate(regions) if region.slots["vstore"] > 8 and i not in bodies]
    first = sum(regions[i].bundles for i in once if i < bodies[0])
    last = sum(regions[i].bundles for i in once if i > bodies[-1])
    rest = sum(region.bundles for region in regions) - first - last - sum(regions[i].bundles for i in bodies)
    return KernelSchedule(name, rest, first, last, tuple(regions[i] for i in bodies))
