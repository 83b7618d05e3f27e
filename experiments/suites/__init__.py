"""What `benchmark.py` times: one module a suite, with UNIT and cases(); or with table(), where nothing is timed.

A suite may have plot(rows, path), which draws its rows beside --output.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class Case(NamedTuple):
    """Contenders that do the same `work`, in the suite's unit times seconds; ours is the first.

    limits: by name, the seconds that the work would take at some limit of the machine; rows give the share of it that
    each contender reaches.
    """

    name: str
    work: float
    contenders: dict[str, Callable[..., object]]
    limits: Mapping[str, float] = MappingProxyType({})
