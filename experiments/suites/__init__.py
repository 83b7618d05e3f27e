"""What `benchmark.py` times: one module a suite, with UNIT and cases(); or with table(), where nothing is timed."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """Contenders that do the same `work`, in the suite's unit times seconds; ours is the first."""

    name: str
    work: float
    contenders: dict[str, Callable[..., object]]
